"""Stands in for `modules.sd_samplers_common`: how a sampling ends early."""


class InterruptedException(BaseException):
    """Somebody pressed Interrupt or Skip."""
