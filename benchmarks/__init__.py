"""Side by side with peers, in one run, interleaved: `python -m benchmarks [name ...]`."""
