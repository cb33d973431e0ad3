"""An HTTP API that takes 100 ms for each reply: python misc/contestants/slow_api.py PORT."""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPLY = b'{"city": "Mountain View", "region": "California", "country_name": "United States"}'


class Handler(BaseHTTPRequestHandler):
    """Knows one place only."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet a reply: with two the second waits for the client's delayed acknowledgement of the first

    def do_GET(self) -> None:
        """Reply, late."""
        time.sleep(0.1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(REPLY)))
        self.end_headers()
        self.wfile.write(REPLY)

    def log_message(self, *_arguments: Any) -> None:
        """Keep quiet."""


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
