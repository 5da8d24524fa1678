"""The names of a run's metrics, as its events and its ``metrics.jsonl`` have them: one list for writer and readers."""

METRICS_FILE = "metrics.jsonl"

TOTAL = "loss_metrics/global_avg_loss"
NTP = "loss_metrics/ntp_loss"
NITP = "loss_metrics/nitp_loss"
VALIDATION_TOTAL = "validation_metrics/loss"
VALIDATION_NTP = "validation_metrics/ntp_loss"
VALIDATION_NITP = "validation_metrics/nitp_loss"
EFFECTIVE_RANK = "geometry/effective_rank"
MEAN_COSINE = "geometry/mean_cosine_similarity"
MAX_LOAD = "moe/max_load"
SKIPPED_STEPS = "faults/skipped_steps"
