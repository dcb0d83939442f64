"""What each way of keeping a table would cost and catch, from traces of its ids."""

from torchrec_cafe.profile.table import TableProfile, TraceOptions

__all__ = ["TableProfile", "TraceOptions"]
