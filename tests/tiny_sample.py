"""A small plan of the embedded default for tests."""

from gemel.sample_workload.tasks import Plan
from merge_workloads import sample_methods

TINY = Plan(scenes=(20, 12, 4), crops=(10, 6, 2), epochs=0.9)
METHODS = sample_methods()
