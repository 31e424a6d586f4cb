"""Stands in for `modules.sd_samplers_common`: early ends of sampling."""


class InterruptedException(BaseException):
    """Interrupt or Skip was pressed."""
