"""The benchmark: cases, peers, runner, report; installed as `fused_res.benchmarks`."""
