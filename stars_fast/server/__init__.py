"""An HTTP server in the shape of OpenAI's API, on an `AsyncEngine`. Needs the extra ``server``."""

from stars_fast.server.app import create_app
from stars_fast.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
