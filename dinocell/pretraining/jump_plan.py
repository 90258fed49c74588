"""How fast a line, how many cores and how much memory a training step needs: `dinocell jump plan`."""

from typing import Any

from dinocell.pretraining.jump_fields import streaming_errors


def describe_plan(**load: Any) -> str:
    """The needs of a training step for several numbers of visits as a table, and a recommendation.

    Takes the arguments of `dinov3.cells.streaming.plan.Workload`; UsageError for one out of range.
    """
    from dinov3.cells.streaming.plan import Workload, make_plan

    with streaming_errors():
        work = Workload(**load)
    plan = make_plan(work)
    lines = [
        f"{plan.samples_per_s:.1f} samples/s; {work.field_megabytes:g} MB a field, "
        f"{work.decode_ms:g} ms to decode it, {work.augment_ms:g} ms to cut a sample's crops",
        "visits    MB/s  requests/s  connections  decode cores  crop cores  pool GB  used  bottleneck",
    ]
    for need in plan.needs:
        lines.append(
            f"{need.visits:6} {need.megabytes_per_s:7.0f} {need.requests_per_s:11.0f} "
            f"{need.connections:12.0f} {need.decode_cores:13.2f} {need.augment_cores:11.2f} "
            f"{need.pool_gb:8.1f} {100 * need.data_share:4.0f}%  {need.bottleneck}"
        )
    return "\n".join([*lines, plan.advice])
