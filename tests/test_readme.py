"""The README says what the files say, and its transcript is what the demo prints."""

import re
import subprocess

import pytest

from conftest import PROJECT

README = (PROJECT / "README.md").read_text()


def without_times(text: str) -> list[str]:
    """Lines of a transcript, without what differs from run to run."""
    return [re.sub(r"^\S+ \S+ INFO", "INFO", line).strip() for line in text.splitlines() if line.strip()]


@pytest.mark.timeout(600)
def test_transcript_is_what_the_demo_prints() -> None:
    transcript = README.split("$ misc/demo.sh\n")[1].split("```")[0]
    ended = subprocess.run([str(PROJECT / "misc" / "demo.sh")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    printed = without_times(ended.stdout + ended.stderr)
    for line in without_times(transcript):
        assert line in printed


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(misc/[\w./-]+|tests/[\w./-]*|\w+\.py)`", README))))
def test_paths_exist(path: str) -> None:
    assert (PROJECT / path).exists()


def test_only_what_belongs_there_is_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "README.md",
        "kafka_enrich.py",
        "load_data.py",
        "misc",
        "requirements.txt",
        "tests",
    }
