"""Run a benchmark, on a laptop or a cluster.

torchx run -s local_cwd torchx_components/bench.py:run -- train_step --quick
"""

from typing import Dict, List, Optional  # noqa: UP035  TorchX reads no other spelling

from torchrec_cafe_launch.torchx_components.job import python_path  # pyright: ignore[reportMissingImports]
from torchx import specs
from torchx.specs.finder import ComponentValidationException


def run(
    *script_args: str,
    image: str = "torchrec-cafe",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    checkout: str = "",
) -> specs.AppDef:
    """Run a benchmark, python -m benchmarks.NAME; it starts the ranks that it needs itself.

    Args:
        script_args: NAME and flags of the benchmark
        image: image of the job, on schedulers that need one
        cpu: cores
        gpu: GPUs
        memMB: memory, in MB
        h: a named resource; overrides cpu, gpu and memMB
        env: environment of the benchmark, NAME=VALUE,NAME=VALUE
        mounts: type=bind or volume,src=HERE,dst=THERE[,readonly], on schedulers with images
        max_retries: how often the scheduler may start the job again
        checkout: checkout of torchrec-cafe on the machine of the job; this one by default
    """
    if not script_args or script_args[0].startswith("-"):
        raise ComponentValidationException(
            "the first argument must be the name of a benchmark, as in `-- train_step --quick`"
        )
    name, *arguments = script_args
    module = f"benchmarks.{name}"
    return specs.AppDef(
        name=f"bench-{name.replace('_', '-')}",
        roles=[
            specs.Role(
                name="bench",
                image=image,
                entrypoint="python",
                args=["-m", module, *arguments],
                num_replicas=1,
                env={
                    "PYTHONPATH": python_path(checkout, module),
                    "PYTHONUNBUFFERED": "1",
                    **(env or {}),
                },
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
                mounts=specs.parse_mounts(mounts) if mounts else [],
                max_retries=max_retries,
            )
        ],
    )
