"""The chat as a Serve app: typed arguments in, an application out.

serve deploy serve_config.yaml           # import_path: milm_ray.serving.chat.build:build_chat_app
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from milm_ray.serve_settings import ChatSection

if TYPE_CHECKING:
    from ray.serve import Application


class ChatArgs(ChatSection):
    """Arguments of `build_chat_app`: in serve_config.yaml under `args:`."""

    keys_file: str | None = Field(
        None, description="API keys, as access.keys_file; None: only this machine is answered"
    )
    default_database: str | None = Field(
        None, description="the SQLite file where neither database nor the environment names one"
    )


class ChatReplica:
    """A Serve deployment of the chat."""

    def __init__(self, args: dict[str, Any]) -> None:
        self._args = ChatArgs.model_validate(args)

    def __serve_build_asgi_app__(self) -> Any:
        from milm_ray.serving.chat.app import create_app

        default = self._args.default_database
        return create_app(self._args, self._args.keys_file, Path(default) if default else None)


def build_chat_app(args: ChatArgs) -> Application:
    """The chat's Serve application, to be mounted at /chat."""
    from ray import serve

    replica = serve.ingress()(ChatReplica)
    deployment = serve.deployment(
        name="chat",
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": args.num_cpus},
        max_ongoing_requests=1_000_000,  # replies are what is bounded, by max_replies
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10,
    )(replica)
    return deployment.bind(args.model_dump(mode="json"))


# `from __future__ import annotations` leaves a string, and Serve looks for the class itself.
build_chat_app.__annotations__["args"] = ChatArgs
