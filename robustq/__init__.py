"""robustq: harden low-bit vision models, write the file the device runs, and judge robustness on that very file.

The functions are those of the commands. Their results have attributes, and the keys of ``--json`` as in a dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustq.workflow.attack import attack_model
    from robustq.workflow.bench import bench_files
    from robustq.workflow.bench_all import bench_everything
    from robustq.workflow.evaluate import evaluate
    from robustq.workflow.export import export_model
    from robustq.workflow.export_weights import export_weights
    from robustq.workflow.harden import harden_model
    from robustq.workflow.info import describe_file
    from robustq.workflow.quickstart import quickstart
    from robustq.workflow.recheck import recheck_bundle
    from robustq.workflow.replay import replay_images
    from robustq.workflow.resume import resume_run
    from robustq.workflow.train import train_model

_HOMES = {
    "train_model": "robustq.workflow.train",
    "harden_model": "robustq.workflow.harden",
    "bench_everything": "robustq.workflow.bench_all",
    "bench_files": "robustq.workflow.bench",
    "attack_model": "robustq.workflow.attack",
    "evaluate": "robustq.workflow.evaluate",
    "describe_file": "robustq.workflow.info",
    "export_model": "robustq.workflow.export",
    "export_weights": "robustq.workflow.export_weights",
    "recheck_bundle": "robustq.workflow.recheck",
    "replay_images": "robustq.workflow.replay",
    "resume_run": "robustq.workflow.resume",
    "quickstart": "robustq.workflow.quickstart",
}

__all__ = [
    "attack_model",
    "bench_everything",
    "bench_files",
    "describe_file",
    "evaluate",
    "export_model",
    "export_weights",
    "harden_model",
    "quickstart",
    "recheck_bundle",
    "replay_images",
    "resume_run",
    "train_model",
]


def __getattr__(name: str) -> Any:
    """Import a job when it is first named: ``import robustq`` alone loads no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("robustq")
    if name not in _HOMES:
        raise AttributeError(f"module 'robustq' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
