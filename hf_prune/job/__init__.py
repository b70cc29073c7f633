"""`hf-prune run`: load, train dense and pruned, verify, evaluate, save, report, push; or a look ahead."""

from hf_prune.job.models import meta_model
from hf_prune.job.preview import plan_only, smoke, smoke_trains
from hf_prune.job.progress import Stages
from hf_prune.job.run import run
from hf_prune.job.scan import recipe_to_scan, run_scan


__all__ = ["Stages", "meta_model", "plan_only", "recipe_to_scan", "run", "run_scan", "smoke", "smoke_trains"]
