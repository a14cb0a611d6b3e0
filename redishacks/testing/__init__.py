"""Private servers and a fault-injecting proxy for tests."""
