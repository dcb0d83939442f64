"""What each way of keeping a table would cost and catch, from traces of its ids."""

from torchrec_cafe.profile.table import TableProfile, TraceOptions
from torchrec_cafe.profile.trace import Profile, profile_trace

__all__ = ["Profile", "TableProfile", "TraceOptions", "profile_trace"]
