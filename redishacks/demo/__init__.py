"""The demonstration behind `redishacks demo`: real traffic, a killed flusher, exact counts.

`traffic` reads a log or makes hits up, `table` is where SQL counts them, `flusher` is a process
that flushes and can be killed, and `replay` is the play: what happens when, and how it came out.
"""
