"""The library measured beside what one would use instead, in one run; `python -m benchmarks --help`.

- `cases`: what is sent; `peers/`: by whom, one small file each; `worker`, `pair`: two processes of a peer;
- `plane`: the data plane in rounds; `lifecycle`, `rooms`, `job`: the rest of what is measured;
- `figures`: ratios and aims; `report`, `plots`: Markdown, JSON and PNG.
"""
