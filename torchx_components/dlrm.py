"""Train the DLRM example on a laptop or a cluster.

On this machine, on two ranks:

    torchx run -s local_cwd torchx_components/dlrm.py:train

With flags of ``examples/dlrm/train.py`` after the component:

    torchx run -s local_cwd torchx_components/dlrm.py:train --full --seed 0,1,2
"""

from pathlib import Path
from typing import Optional

from torchx import specs
from torchx.components import dist


def train(
    *script_args: str,
    j: str = "1x2",
    image: str = "torchrec-cafe",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,  # noqa: N803  TorchX's own name
    h: Optional[str] = None,  # noqa: UP045  TorchX reads no other spelling
    max_retries: int = 0,
) -> specs.AppDef:
    """Train a TorchRec DLRM with full, hashed and CAFE tables, and compare them.

    Args:
        script_args: flags of examples/dlrm/train.py
        j: nodes x ranks per node
        image: image of the job, on schedulers that need one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node, in MiB
        h: a named resource; overrides cpu, gpu and memMB
        max_retries: how often the scheduler may restart the job
    """
    root = Path(__file__).resolve().parent.parent
    return dist.ddp(
        *script_args,
        m="examples.dlrm.train",
        name="dlrm-train",
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        j=j,
        max_retries=max_retries,
        env={
            "PYTHONPATH": str(root),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            # Otherwise ranks that are restarted look for each other where those before them were
            # (torch 2.13, pytorch/pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )
