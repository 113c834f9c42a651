"""``[annotate]`` of a configuration: which open images, who says what about them, how fast and for how much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mllm_fl.annotate.open_images import Source
from mllm_fl.annotate.prompts import KINDS
from mllm_fl.errors import UserError
from mllm_fl.toml import to_dict


@dataclass(frozen=True)
class AnnotateConfig:
    """``[annotate]``: which open images, and who says what about them.

    ``source``: "glyphs" (rendered characters with known truth) or ``folder:PATH`` (any images below it). ``images``: how many,
    drawn without replacement. ``image_size``: pixels of the shorter side; absent means 16 for glyphs, as they are for folders.
    ``labels``: the closed list of the kind "label". ``licence``: of pictures whose source does not say.
    ``backend``: "mini" (the bundled model), "openai" (an endpoint, with ``model`` and ``base_url``), or a Hugging Face folder or id.
    ``prompts``: "auto" takes the bundled model's own questions for "mini", and our instructions for all others.
    ``timeout`` and ``first_pause`` are in seconds. ``max_side``: larger pictures are scaled down to so many pixels before they are sent
    (768). ``device``: where a local model runs ("cpu", "cuda"; absent: the graphics processor where there is one).
    ``requests_per_minute``, ``tokens_per_minute``: of this process. ``prices``: a TOML file with the model's price per million tokens;
    ``max_cost`` (in its currency) and ``max_requests`` cap all that this corpus takes, earlier runs included. ``again``: how often an
    answer that is no record is asked for once more in a run (1 for endpoints, else 0). ``batch``: hand in files of OpenAI's Batch form.
    ``actors``: so many Ray actors ask, on this machine or on all of a cluster's (RAY_ADDRESS); concurrency is then that of each, and the
    rates are shared out. ``actor_gpus``: graphics processors of each.
    """

    source: str = "glyphs"
    images: int = 384
    image_size: int | None = None
    seed: int = 1000
    kinds: tuple[str, ...] = ("conversation", "detail", "reasoning")
    backend: str = "mini"
    prompts: Literal["auto", "instruct", "glyphs"] = "auto"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = 256
    batch_size: int = 64
    concurrency: int = 16
    retries: int = 5
    timeout: float = 120.0
    first_pause: float = 1.0
    labels: tuple[str, ...] | None = None
    licence: str | None = None
    max_side: int | None = None
    device: str | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    prices: str | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    again: int | None = None
    batch: bool | None = None
    actors: int | None = None
    actor_gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("images", "max_tokens", "batch_size", "concurrency", "max_side", "max_requests", "actors"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"annotate.{name}", f"{value} is below 1")
        for name in ("requests_per_minute", "tokens_per_minute", "max_cost"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"annotate.{name}", f"{value:g} is not above 0", "leave it out for no limit")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise UserError("annotate.image_size", f"{self.image_size} is outside 8 .. 4096 pixels")
        if self.source != "glyphs" and not self.source.removeprefix("folder:") != self.source:
            raise UserError("annotate.source", f"unknown source {self.source!r}", "use glyphs or folder:PATH")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError("annotate.kinds", f"unknown kind {kind!r}", f"choose from {', '.join(KINDS)}")
        if self.backend == "openai" and not self.model:
            raise UserError("annotate.model", "is not set, and an endpoint needs a model's name", 'write model = "..."')
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                "annotate.base_url", f"{self.base_url!r} is no http(s) address", "for example http://127.0.0.1:8000/v1"
            )
        if self.retries < 0 or self.timeout <= 0 or self.first_pause < 0 or (self.again or 0) < 0:
            raise UserError(
                "annotate.retries",
                "retries, timeout, first_pause and again must not be negative",
                "timeout is above 0 seconds",
            )
        if self.actor_gpus < 0 or (self.batch and self.actors):
            problem = "is negative" if self.actor_gpus < 0 else "cannot be with batch, where the endpoint does the work"
            raise UserError(
                "annotate.actor_gpus" if self.actor_gpus < 0 else "annotate.actors", problem, "leave it out"
            )
        if self.backend != "openai" and (self.batch or self.max_cost is not None):
            name = "batch" if self.batch else "max_cost"
            raise UserError(
                f"annotate.{name}", f"belongs to an endpoint, not to {self.backend!r}", 'backend = "openai"'
            )

    @property
    def style(self) -> str:
        """Which prompts are meant: "instruct" or "glyphs"."""
        return self.prompts if self.prompts != "auto" else "glyphs" if self.backend == "mini" else "instruct"

    def open_images(self) -> Source:
        """Which open images are meant."""
        return Source(self.source, self.images, self.image_size, self.seed, self.licence or "")

    def lasting(self) -> dict[str, Any]:
        """What the corpus depends on, as plain values: everything but how, how fast and for how much its questions are asked."""
        return {k: v for k, v in to_dict(self).items() if k not in FREE}

    def named_by(self) -> dict[str, Any]:
        """The same for the name of the corpus's folder: the free values are there, as their defaults."""
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self) if f.name in FREE}
        return to_dict(dataclasses.replace(self, **defaults))


FREE = (
    *("base_url", "api_key_env", "concurrency", "retries", "timeout", "first_pause", "device", "requests_per_minute"),
    *("tokens_per_minute", "prices", "max_cost", "max_requests", "again", "batch", "actors", "actor_gpus"),
)
"""What may change when a corpus is continued."""
