"""The README says what the files say, and its transcript is what the demo prints."""

import os
import re
import subprocess

import pytest

from conftest import PROJECT

README = (PROJECT / "README.md").read_text()
SCRIPT = (PROJECT / "kafka_enrich.py").read_text()


def without_times(text: str) -> list[str]:
    """Lines of a transcript, without what differs from run to run."""
    return [re.sub(r"^\S+ \S+ INFO", "INFO", line).strip() for line in text.splitlines() if line.strip()]


@pytest.mark.timeout(600)
def test_transcript_is_what_the_demo_prints() -> None:
    transcript = README.split("$ misc/demo.sh\n")[1].split("```")[0]
    ended = subprocess.run(
        [PROJECT / "misc" / "demo.sh"],
        env={name: value for name, value in os.environ.items() if not name.startswith("KAFKA_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    rest = iter(without_times(ended.stdout))
    for line in without_times(transcript):
        assert line in rest, f"the demo does not print, or not at this place: {line}\n{ended.stdout}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?<![\w/])(?:misc|tests)/[\w./-]*\w|\b\w+\.py\b", README))))
def test_paths_exist(path: str) -> None:
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("metric", sorted(set(re.findall(r"`(kafka_enrich_\w+)", README))))
def test_metrics_exist(metric: str) -> None:
    short = re.sub(r"^kafka_enrich_|_(total|info)$", "", metric)
    assert re.search(rf'"(kafka_enrich_)?{short}"', SCRIPT)


def test_length() -> None:
    lines = README.splitlines()
    assert len(lines) < 250
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


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
