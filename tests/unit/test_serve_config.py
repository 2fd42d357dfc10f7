"""serve_config.yaml says what the apps' builders take."""

from __future__ import annotations

import importlib
import typing
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_every_application_s_arguments_are_those_of_its_builder():
    applications = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))["applications"]
    assert [app["route_prefix"] for app in applications] == ["/", "/chat"]
    for app in applications:
        module, _, builder = app["import_path"].partition(":")
        arguments = getattr(importlib.import_module(module), builder).__annotations__["args"]
        assert not isinstance(arguments, str)  # Serve looks for the class itself
        typing.cast("typing.Any", arguments).model_validate(app["args"])
