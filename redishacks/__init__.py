"""Redis tricks that keep a big site up, right under faults and fast.

One module per tool, each usable alone:

- `redishacks.counters`: count in Redis, flush to SQL exactly once.
- `redishacks.sinks`: where the flush writes: PostgreSQL, SQLite, or your own.
- `redishacks.testing`: private servers and a fault-injecting proxy for tests.

Importing this package imports no tool and opens no connection.
"""

from redishacks.errors import RedisHacksError

__all__ = ["RedisHacksError", "__version__"]

__version__ = "0.1.0"
