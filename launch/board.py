"""`llama4 board RUN`: a page about a run, written anew as it goes, or goes on; no server is needed to look at it.

It ends with the run. One that was stopped, refused or not heard of may be started again, so that it is watched on.
`--serve` shows it at an address of this machine, for a run whose folder a browser cannot open.
"""

from __future__ import annotations

import argparse
import http.server
import threading
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", metavar="FILE.html", default="", help="default: board.html in the run's folder")
    parser.add_argument("--every", type=int, default=30, metavar="SECONDS", help="between pages (default: 30)")
    parser.add_argument("--once", action="store_true", help="write one page, and end")
    parser.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT",
                        help="at http://127.0.0.1:PORT (default: 8000), until Ctrl-C")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from training import board, status

    if args.every < 1:
        raise ValueError(f"--every must be at least 1 second, not {args.every}")
    if args.serve is not None:
        status.read(args.run)  # there is a run
        return serve(args.run, args.serve, args.every)
    file, told = args.out or f"{args.run}/board.html", ""
    while True:
        found = board.write(args.run, 0 if args.once else args.every, args.out)
        line = f"{file}: {found['state']}, step {found['step']:,}"
        goes_on = not args.once and found["state"] != "complete"
        if goes_on and found["state"] not in status.UNDER_WAY:
            line += "; written anew once it goes on, until Ctrl-C"
        if line != told:
            print(told := line, flush=True)
        if not goes_on:
            return 0
        time.sleep(args.every)


def serve(folder: str, port: int, every: int) -> int:
    """The page, made anew when it is older than `every` seconds; on this machine alone."""
    from training import board, status

    made: tuple[float, bytes] = (0.0, b"")
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal made
            if self.path not in ("/", "/board.html"):
                return self.send_error(404)
            with lock:
                if time.monotonic() - made[0] > every or not made[1]:
                    made = time.monotonic(), board.build(status.read(folder), every).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(made[1])))
            self.end_headers()
            self.wfile.write(made[1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(f"cannot serve at port {port}: {error.strerror}; --serve {port + 1} takes another") from error
    with server:
        print(f"http://127.0.0.1:{server.server_port} shows {folder}, until Ctrl-C", flush=True)
        server.serve_forever()
    return 0
