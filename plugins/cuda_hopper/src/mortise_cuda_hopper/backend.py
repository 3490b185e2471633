"""The backend class of the NVIDIA Hopper GPU; it refuses to serve until it answers a hook."""

from __future__ import annotations

from mortise.plugin import Backend, BackendUnusableError, BindContext, ReasonCode


class HopperBackend(Backend):
    """Answers no hook yet; the core reads so in its manifest and does not import this class."""

    @classmethod
    def create(cls, context: BindContext) -> HopperBackend:
        """Refuse, with the reason that the manifest gives."""
        raise BackendUnusableError(
            "backend 'cuda_hopper' cannot serve: no hook is implemented in this release",
            reason=ReasonCode.CANNOT_SERVE_YET,
            details=[f"asked for the {context.role.value} model"],
            remedy="use backend 'reference', or a later mortise-cuda-hopper",
        )
