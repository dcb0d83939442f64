"""Train the DLRM example, and evaluate what was trained, on a laptop or a cluster.

On this machine, on two ranks:

    torchx run -s local_cwd torchx_components/dlrm.py:train

With flags of ``examples/dlrm/train.py`` after the component:

    torchx run -s local_cwd torchx_components/dlrm.py:train --full --seed 0,1,2
"""

from typing import Dict, List, Optional  # noqa: UP035  TorchX reads no other spelling

from torchrec_cafe_launch.torchx_components.job import ranks  # pyright: ignore[reportMissingImports]
from torchx import specs


def train(
    *script_args: str,
    j: str = "1x2",
    image: str = "torchrec-cafe",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    checkout: str = "",
) -> specs.AppDef:
    """Train a TorchRec DLRM with full, hashed and CAFE tables, and compare them.

    Args:
        script_args: flags of examples/dlrm/train.py
        j: [fewest nodes:]nodes x ranks per node
        image: image of the job, on schedulers that need one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node, in MB
        h: a named resource; overrides cpu, gpu and memMB
        env: environment of the ranks, NAME=VALUE,NAME=VALUE
        mounts: type=bind or volume,src=HERE,dst=THERE[,readonly], on schedulers with images
        max_retries: how often the scheduler may start the job again
        max_restarts: how often torchrun may restart the ranks, when one has died
        rdzv_port: of the rendezvous on the first node, where there are several
        checkout: checkout of torchrec-cafe on the machines of the job; this one by default
    """
    return ranks(
        "examples.dlrm.train",
        script_args,
        env or {},
        checkout,
        max_restarts,
        name="dlrm-train",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def evaluate(
    *script_args: str,
    j: str = "1x2",
    image: str = "torchrec-cafe",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    checkout: str = "",
) -> specs.AppDef:
    """Evaluate checkpoints that training has saved, on any number of ranks.

    Args:
        script_args: flags of examples/dlrm/evaluate.py: those that it was trained with
        j: [fewest nodes:]nodes x ranks per node
        image: image of the job, on schedulers that need one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node, in MB
        h: a named resource; overrides cpu, gpu and memMB
        env: environment of the ranks, NAME=VALUE,NAME=VALUE
        mounts: type=bind or volume,src=HERE,dst=THERE[,readonly], on schedulers with images
        max_retries: how often the scheduler may start the job again
        max_restarts: how often torchrun may restart the ranks, when one has died
        rdzv_port: of the rendezvous on the first node, where there are several
        checkout: checkout of torchrec-cafe on the machines of the job; this one by default
    """
    return ranks(
        "examples.dlrm.evaluate",
        script_args,
        env or {},
        checkout,
        max_restarts,
        name="dlrm-evaluate",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )
