"""guard.py: who may ask, seen from outside; an unguarded server shows that the attacks are real."""

import http.server
import threading

import pytest
from pipelines.play.raw import TOKEN, ask, handshake, running
from worldloom.pipelines.play.guard import Guard, new_token
from worldloom.pipelines.play.server import hosts_of

SOCKET = "/play?client=one&"
PAGES = ["/?", "/start/0.png?", SOCKET]
POST = "/picture?"


@pytest.fixture(scope="module")
def guarded(steer_world, tmp_path_factory):
    with running(steer_world, tmp_path_factory.mktemp("guarded"), hold_s=0.0) as server:
        yield server


@pytest.fixture(scope="module")
def unguarded(steer_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unguarded")
    with running(steer_world, folder, hold_s=0.0, guarded=False) as server:
        yield server


def status(server, path, *, query=f"token={TOKEN}", host=None, origins=None):
    """The status of a request from somewhere; 101, 200 if it gets in."""
    host = f"127.0.0.1:{server.port}" if host is None else host.replace("PORT", str(server.port))
    origins = [f"http://{host}"] if origins is None else origins
    headers = [("Host", host)]
    headers += [("Origin", origin.replace("PORT", str(server.port))) for origin in origins]
    if path == SOCKET:
        return handshake(server.port, path + query, headers)
    method, body = ("POST", b"a picture") if path == POST else ("GET", b"")
    return ask(server.port, method, path + query, headers, body)[0]


FORGED = {
    "a page of another site": {"origins": ["http://evil.test"]},
    "a page on another local port": {"origins": ["http://127.0.0.1:8000"]},
    "a page on another name of this machine": {"origins": ["http://localhost:PORT"]},
    "a page of the same name over https": {"origins": ["https://127.0.0.1:PORT"]},
    "a sandboxed page or a file": {"origins": ["null"]},
    "an origin that only begins like ours": {"origins": ["http://127.0.0.1:PORT.evil.test"]},
    "a name pointed at this machine": {"host": "evil.test:PORT"},
    "that name without an origin": {"host": "evil.test", "origins": []},
    "a name that begins like ours": {"host": "localhost.evil.test:PORT"},
    "an address of another machine": {"host": "192.0.2.7:PORT"},
    "an empty name": {"host": "", "origins": []},
    "no token": {"query": ""},
    "an empty token": {"query": "token="},
    "another token": {"query": "token=" + TOKEN[:-1] + "x"},
    "the beginning of the token": {"query": "token=" + TOKEN[:-1]},
    "two tokens": {"query": f"token={TOKEN}&token=x"},
    "a token of strange letters": {"query": "token=%ff%00%f0"},
}


@pytest.mark.parametrize("path", [*PAGES, POST])
@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_what_is_forged_is_refused_and_without_the_guard_it_gets_in(
    guarded, unguarded, path, forged
):
    assert status(guarded, path, **forged) == 403
    assert status(unguarded, path, **forged) in (101, 200)


@pytest.mark.parametrize("path", [*PAGES, POST])
def test_a_second_origin_does_not_hide_behind_ours(guarded, path):
    origins = ["http://127.0.0.1:PORT", "http://evil.test"]
    refusal = 400 if path == SOCKET else 403  # websockets itself refuses two
    assert status(guarded, path, origins=origins) == refusal
    assert status(guarded, path, origins=origins[::-1]) == refusal


@pytest.mark.parametrize("path", [*PAGES, POST])
@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:8000", "LocalHost", "[::1]:9"])
def test_our_own_page_gets_in_under_every_name_of_this_machine_and_behind_any_port(
    guarded, path, host
):
    assert status(guarded, path, host=host) in (101, 200)
    assert status(guarded, path, host=host, origins=[]) in (101, 200)


@pytest.mark.parametrize("path", ["/play.js", "/play.css"])
def test_the_pages_parts_need_no_token_and_hold_none_but_a_strangers_name_gets_nothing(
    guarded, path
):
    here = [("Host", f"127.0.0.1:{guarded.port}")]
    code, _, content = ask(guarded.port, "GET", path, here)
    assert code == 200
    assert TOKEN.encode() not in content
    assert ask(guarded.port, "GET", path, [("Host", "evil.test")])[0] == 403


@pytest.mark.parametrize("path", ["/", "/?token=" + TOKEN, "/no-such?token=" + TOKEN, "/play.js"])
def test_every_answer_tells_the_browser_to_run_frame_guess_and_keep_nothing(guarded, path):
    host = f"127.0.0.1:{guarded.port}"
    _, headers, _ = ask(guarded.port, "GET", path, [("Host", host)])
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "server" not in headers


def test_a_strangers_name_is_never_written_into_the_answer(guarded):
    code, headers, body = ask(guarded.port, "GET", "/", [("Host", "evil.test; script-src *")])
    assert code == 403
    assert "evil" not in str(headers) + body.decode()


def test_a_refusal_says_what_to_open(guarded):
    _, _, body = ask(guarded.port, "GET", "/", [("Host", "localhost")])
    assert body.decode().startswith("the token in the address is missing or another; open the")


def test_every_start_has_a_token_of_its_own_that_cannot_be_guessed():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 32


@pytest.mark.parametrize(
    ("host", "asked", "here"),
    [
        ("127.0.0.1", "192.0.2.7", False),
        ("0.0.0.0", "192.0.2.7:7860", True),
        ("0.0.0.0", "[2001:db8::1]:7860", True),
        ("0.0.0.0", "evil.test", False),
        ("0.0.0.0", "192.0.2.7.evil.test", False),
        ("::", "192.0.2.7", True),
        ("gpu-box", "gpu-box:7860", True),
        ("gpu-box", "192.0.2.7", False),
        ("192.0.2.7", "192.0.2.7:7860", True),
        ("2001:db8::1", "[2001:db8::1]", True),
    ],
)
def test_where_it_listens_decides_by_which_names_it_goes(host, asked, here):
    names, any_address = hosts_of(host)
    guard = Guard(None, token="t", hosts=names, any_address=any_address)
    assert guard._is_here(asked) == here


INTRUDER = """<!doctype html><script>
const socket = new WebSocket("ws://127.0.0.1:PORT/play?token=TOKEN&client=x", "worldloom.play.1");
socket.onmessage = () => { document.title = "in"; };
socket.onerror = () => { document.title = "out"; };
</script>"""


@pytest.fixture
def elsewhere():
    """A page on another port of this machine; `.page` is what it says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(self.server.page.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_page_on_another_local_port_that_knows_the_token_stays_out_in_a_real_browser(
    guarded, unguarded, elsewhere, chromium
):
    def intrude(server):
        elsewhere.page = INTRUDER.replace("PORT", str(server.port)).replace("TOKEN", TOKEN)
        page = chromium.new_page()
        try:
            page.goto(f"http://127.0.0.1:{elsewhere.server_address[1]}/")
            page.wait_for_function("document.title != ''")
            return page.title()
        finally:
            page.close()

    assert (intrude(guarded), intrude(unguarded)) == ("out", "in")
