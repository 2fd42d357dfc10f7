"""The call to a human: high risk is posted to a webhook, again and again until it is accepted.

The calls wait in the database, so one that was due when a replica died is made by the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from datetime import UTC, datetime

import httpx

from milm_ray.serve_settings import TakeoverSection
from milm_ray.serving.chat.database import Unavailable
from milm_ray.serving.chat.store import Store
from milm_ray.serving.chat.tables import Intervention

log = logging.getLogger("milm_ray")
_LOOK_EVERY_S = 1.0


class Takeover:
    def __init__(self, settings: TakeoverSection, store: Store) -> None:
        self._settings = settings
        self._store = store

    async def run(self) -> None:
        """Make the calls that are due, for as long as the replica lives."""
        token = os.environ.get(self._settings.token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient(timeout=self._settings.timeout_s, headers=headers) as client:
            while True:
                try:
                    # Held for longer than a call can take, so that no other replica makes it too.
                    due = await self._store.due_calls(hold_s=3 * self._settings.timeout_s)
                    await asyncio.gather(*(self._call(client, call) for call in due))
                except Unavailable:
                    due = []
                if not due:
                    await asyncio.sleep(_LOOK_EVERY_S)

    async def _call(self, client: httpx.AsyncClient, call: Intervention) -> None:
        body = {
            "event": "takeover",
            "intervention_id": call.intervention_id,
            "session_id": call.session_id,
            "at": datetime.fromtimestamp(call.at, UTC).isoformat(timespec="seconds"),
            **json.loads(call.record),
        }
        assert self._settings.url is not None
        try:
            response = await client.post(self._settings.url, json=body)
            response.raise_for_status()
        except httpx.HTTPError as error:
            given_up = call.attempts >= self._settings.max_attempts
            log.error(
                "chat | takeover webhook: %s, attempt %d%s",
                type(error).__name__, call.attempts, "; given up" if given_up else "",
            )  # fmt: skip
            again = min(300.0, 2.0**call.attempts)
            await self._store.called(
                call.intervention_id, "failed" if given_up else "pending", again
            )
            return
        await self._store.called(call.intervention_id, "sent")
