"""The coding page: coders mark utterances in the browser; every change is saved as it is made.

A small Starlette app on the loopback interface with one self-contained HTML file. It reads the
blind packet and never its key. Coders on other machines reach it through an SSH tunnel.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milm_ray.config import load_config
from milm_ray.errors import UserError
from milm_ray.miti import coding_words
from milm_ray.miti.coding_scheme import CODES, GLOBAL_NAMES, GLOBALS, MAX_CODES_PER_VOLLEY
from milm_ray.miti.coding_store import ADJUDICATED, CodingStore, Refused
from milm_ray.miti.packet import Item
from milm_ray.miti.sheet import write_csv
from milm_ray.miti.study_packet import load_items
from milm_ray.workspace import Workspace

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("milm_ray")
PORT = 8300
_HEADER = "x-coding"  # a page of another site cannot send it without asking first
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def build_app(items: Sequence[Item], store: CodingStore, coders: Sequence[str]) -> Starlette:
    """The app over a packet's items; coders: who may code, `adjudicated` besides."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.responses import Response as PlainResponse
    from starlette.routing import Route

    known = [*coders, ADJUDICATED]
    by_id = {item.item_id: item for item in items}
    page = files("milm_ray.miti").joinpath("coding_page.html").read_text(encoding="utf-8")

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    async def scheme(request: Request) -> Response:
        return JSONResponse(
            {
                "codes": [
                    {**asdict(code), "zh": coding_words.CODES_ZH[code.name]} for code in CODES
                ],
                "globals": [
                    {**asdict(score), "zh": coding_words.GLOBALS_ZH[score.name]}
                    for score in GLOBALS
                ],
                "coders": list(coders),
                "adjudicated": ADJUDICATED,
                "most": MAX_CODES_PER_VOLLEY,
            }
        )

    async def listing(request: Request) -> Response:
        coder = _coder(request.query_params.get("coder"), known)
        return JSONResponse([_progress(store, coder, item, coders) for item in items])

    async def one(request: Request) -> Response:
        coder = _coder(request.query_params.get("coder"), known)
        item = by_id.get(request.path_params["item"])
        if item is None:
            raise Refused("no such dialogue")
        others: dict[str, Any] = {}
        if coder == ADJUDICATED:
            others = _finished(store, item, coders)
            if len(others) < 2:
                raise Refused("two coders must finish a dialogue before it is adjudicated")
        volleys = [asdict(volley) for volley in item.volleys]
        return JSONResponse(
            {"volleys": volleys, "state": store.state(coder, item.item_id), "others": others}
        )

    async def change(request: Request) -> Response:
        if _HEADER not in request.headers:
            raise Refused("changes come from the coding page only")
        try:
            body = await request.json()
        except ValueError:
            raise Refused("a change must be JSON") from None
        if not isinstance(body, dict):
            raise Refused("a change must be a JSON object")
        coder, item = _coder(body.get("coder"), known), str(body.get("item"))
        if coder == ADJUDICATED and len(_finished(store, by_id.get(item), coders)) < 2:
            raise Refused("two coders must finish a dialogue before it is adjudicated")
        return JSONResponse(_apply(store, coder, item, body))

    async def export(request: Request) -> Response:
        coder = _coder(request.path_params["coder"], known)
        name = "globals" if request.path_params["table"] == "globals" else "utterances"
        with tempfile.TemporaryDirectory() as folder:
            paths = write_csv(items, Path(folder), coder, store.work(coder))
            data = paths[name == "globals"].read_bytes()
        named = {"Content-Disposition": f'attachment; filename="{coder}-{name}.csv"'}
        return PlainResponse(data, media_type="text/csv; charset=utf-8", headers=named)

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"refused": str(error)}, status_code=409)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/api/scheme", scheme),
            Route("/api/items", listing),
            Route("/api/items/{item}", one),
            Route("/api/change", change, methods=["POST"]),
            Route("/export/{coder}-{table}.csv", export),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={Refused: refused},
    )


def _coder(name: Any, known: Sequence[str]) -> str:
    if name not in known:
        raise Refused(f"{name!r} is not among the coders of this study")
    return str(name)


def _finished(store: CodingStore, item: Item | None, coders: Sequence[str]) -> dict[str, Any]:
    """The states of the coders who finished an item."""
    if item is None:
        return {}
    states = {coder: store.state(coder, item.item_id) for coder in coders}
    return {coder: state for coder, state in states.items() if state["finished"]}


def _progress(store: CodingStore, coder: str, item: Item, coders: Sequence[str]) -> dict[str, Any]:
    state = store.state(coder, item.item_id)
    ready = coder != ADJUDICATED or len(_finished(store, item, coders)) >= 2
    return {
        "item": item.item_id,
        "volleys": sum(volley.role == "counselor" for volley in item.volleys),
        "coded": len(state["codes"]),
        "scores": len(state["scores"]),
        "of": len(GLOBAL_NAMES),
        "finished": state["finished"],
        "ready": ready,
    }


def _apply(store: CodingStore, coder: str, item: str, body: dict[str, Any]) -> dict[str, Any]:
    """One change that the page asks for; returns the item's new state."""
    kind = body.get("kind")
    if kind == "code":
        volley, utterance = body.get("volley"), body.get("utterance")
        if not isinstance(volley, int) or not isinstance(utterance, int):
            raise Refused("a code needs its volley and utterance")
        return store.set_code(coder, item, volley, utterance, body.get("code"))
    if kind == "score":
        return store.set_score(coder, item, str(body.get("name")), body.get("score"))
    if kind == "text":
        return store.set_text(coder, item, str(body.get("field")), str(body.get("text", "")))
    if kind == "finish":
        return store.finish(coder, item, bool(body.get("done", True)))
    raise Refused(f"unknown change {kind!r}")


def main(description: str, argv: Sequence[str] | None = None) -> int:
    """`jobs/coding.py`: serve the page until interrupted; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, see jobs/configs/")
    parser.add_argument("--port", type=int, default=PORT, help="0: a free one")
    parser.add_argument("override", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = load_config(options.config, options.override)
        workspace = Workspace.open(config.workspace)
        items = load_items(workspace)
        store = CodingStore.of(workspace, items)
        _serve(build_app(items, store, config.miti.coders), options.port)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _serve(app: Starlette, port: int) -> None:
    import socket

    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(128)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used: {error}", "choose another with --port"
            ) from error
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        log.info("coding page at %s (interrupt to stop; nothing is lost by stopping)", address)
        settings = uvicorn.Config(app, log_level="warning", access_log=False)
        uvicorn.Server(settings).run(sockets=[listener])
