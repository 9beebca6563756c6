"""STARS over other completions servers, such as vLLM, SGLang and llama.cpp.

Needs the extra ``remote``. Terms:

call
    One HTTP request for one segment, or for the segments of several candidates.
server
    What answers the calls, with the parameters that it takes beside OpenAI's.
"""

from stars_fast.remote.engine import RemoteEngine
from stars_fast.remote.http import RemoteError
from stars_fast.remote.judge import Judge
from stars_fast.remote.rewards import RemoteReward
from stars_fast.remote.servers import SERVERS, Server

__all__ = ["SERVERS", "Judge", "RemoteEngine", "RemoteError", "RemoteReward", "Server"]
