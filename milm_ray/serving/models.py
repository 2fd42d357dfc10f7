"""The model endpoints as one Ray Serve app: typed arguments in, an OpenAI-compatible app out.

    serve deploy serve_config.yaml           # import_path: milm_ray.serving.models:build_app

Every model is a deployment of its own on ray.serve.llm and vLLM; one ingress answers /v1/models,
/v1/chat/completions (streamed too) and /v1/completions. `model` is a base, `model:adapter` the base
with an adapter. Only the replicas import torch and vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from ray.serve import Application

_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}

# Hundreds of requests in flight are garbage to the collector's eye every few milliseconds; as
# Serve's own proxy does, replicas look through their objects a tenth as often as Python would.
GC_THRESHOLD = 10_000


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Autoscaling(Arguments):
    """Replicas follow the requests in flight; with equal bounds their number is fixed."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(64, ge=1, description="requests in flight per replica")

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class BaseSource(Arguments):
    """What a base is prepared from, as in milm_ray.models.checkpoint.prepare_base."""

    name_or_path: str
    revision: str | None = None
    chat_format: str | None = None


class ModelArgs(Arguments):
    """One base model. Its chat format and stop tokens are those of its own directory."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="the id clients ask for")
    path: str = Field(description="checkpoint directory, or a hub id")
    source: BaseSource | None = Field(
        None, description="what `path` is made from on a node where it is not there yet"
    )
    max_model_len: int = Field(4096, ge=128, description="prompt and reply together, in tokens")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    num_gpus: float = Field(1.0, ge=0, description="GPUs per worker; 0: run on the CPU")
    num_cpus: float = Field(1.0, gt=0, description="CPUs reserved; without a GPU: the threads")
    tensor_parallel_size: int = Field(1, ge=1)
    accelerator_type: str | None = Field(None, description="a GPU kind as Ray names it, e.g. A100")
    max_num_seqs: int = Field(256, ge=1, description="requests decoded together")
    max_lora_rank: int = Field(8, ge=1, description="the highest rank among the adapters")
    max_adapters: int = Field(2, ge=1, description="adapters in one batch")
    kv_cache_gib: float | None = Field(None, gt=0, description="None: what the device has left")
    max_queued_requests: int = Field(1024, ge=1, description="beyond it: 503 with Retry-After")
    autoscaling: Autoscaling = Autoscaling()
    engine: dict[str, Any] = Field(default_factory=dict, description="further vLLM engine options")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the replicas")

    @model_validator(mode="after")
    def _cpu_needs_a_size(self) -> ModelArgs:
        if self.num_gpus == 0 and self.kv_cache_gib is None:
            raise ValueError("on the CPU give kv_cache_gib: engines there share one memory")
        return self

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the replica reserves: one bundle per worker, the replica itself in the first."""
        first: dict[str, float] = {"CPU": self.num_cpus}
        if self.num_gpus == 0:
            return [first]
        gpu = {"GPU": self.num_gpus}
        kind = {f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {}
        rest = [{**gpu, **kind, "CPU": 1.0} for _ in range(self.tensor_parallel_size - 1)]
        return [{**first, **gpu, **kind}, *rest]


class IngressArgs(Arguments):
    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.1, ge=0)
    max_body_bytes: int = Field(1 << 20, ge=1024, description="beyond it: 413")
    max_tokens: int = Field(4096, ge=1, description="most new tokens a request may ask for")
    default_max_tokens: int = Field(512, ge=1, description="where a request does not say")
    keys_file: str | None = Field(
        None,
        description="API keys, made by `python jobs/keys.py add NAME`, on a path that every node "
        "sees; None: no keys, and only this machine is answered",
    )


class AppArgs(Arguments):
    """Arguments of `build_app`: in serve_config.yaml under `args:`."""

    models: list[ModelArgs] = Field(min_length=1)
    adapters_root: str | None = Field(
        None, description="<root>/<model>/ is the adapter model:mi, <root>/<model>/<name>/ another"
    )
    ingress: IngressArgs = IngressArgs()

    @model_validator(mode="after")
    def _unique_names(self) -> AppArgs:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        return self


def build_app(args: AppArgs) -> Application:
    """The Serve application: an ingress over one deployment per model."""
    from ray import serve

    from milm_ray.serving.ingress import Ingress
    from milm_ray.serving.replica import ModelReplica

    models = {
        model.name: serve.deployment(**_options(model))(ModelReplica).bind(
            model.model_dump(), args.adapters_root
        )
        for model in args.models
    }
    ingress = serve.deployment(
        name="ingress",
        num_replicas=args.ingress.replicas,
        ray_actor_options={"num_cpus": args.ingress.num_cpus},
        max_ongoing_requests=1_000_000,  # the models' own queues are what is bounded
    )(serve.ingress()(Ingress))
    return ingress.bind(args.ingress.model_dump(), args.adapters_root, models)


# `from __future__ import annotations` leaves a string, and Serve looks for the class itself.
build_app.__annotations__["args"] = AppArgs


def _options(model: ModelArgs) -> dict[str, Any]:
    """Serve's deployment options of one model."""
    scaling = model.autoscaling
    env = dict(_ENV)
    if model.num_gpus == 0:
        # As many threads as the replica has CPUs, wherever they are free: engines share the cores.
        env["OMP_NUM_THREADS"] = str(max(1, int(model.num_cpus)))
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env |= model.env
    options: dict[str, Any] = {
        "name": f"model-{model.name}",
        "max_ongoing_requests": 2 * scaling.target_ongoing_requests,
        "max_queued_requests": model.max_queued_requests,
        "ray_actor_options": {"num_cpus": model.num_cpus, "runtime_env": {"env_vars": env}},
        "placement_group_bundles": model.bundles,
        "placement_group_strategy": "PACK",
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
    }
    if scaling.min_replicas == scaling.max_replicas:
        options["num_replicas"] = scaling.max_replicas
    else:
        options["autoscaling_config"] = scaling.model_dump()
    return options
