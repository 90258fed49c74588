"""How fast a line, how many cores and how much memory a training step needs: `dinocell jump plan`."""

from __future__ import annotations

from dinocell.pretraining.jump_fields import streaming_errors


def describe_plan(
    *,
    step_seconds: float,
    batch: int,
    cores: float,
    megabytes_per_s: float,
    field_megabytes: float = 12.35,
    decode_ms: float = 30.0,
    augment_ms: float = 16.1,
) -> str:
    """The needs of a training step for several numbers of visits as a table, and a recommendation.

    Parameters
    ----------
    step_seconds : float
        Duration of a training step.
    batch : int
        Samples of a step on this computer, over all its GPUs.
    cores : float
        CPU cores for the data.
    megabytes_per_s : float
        Of the line to the store.
    field_megabytes, decode_ms, augment_ms : float
        Size of a field's files, time to decode a field, time to cut the crops of a sample.

    Raises
    ------
    UsageError
        A number is not positive.
    """
    from dinov3.cells.streaming.plan import Workload, make_plan

    with streaming_errors():
        plan = make_plan(
            Workload(
                step_seconds=step_seconds,
                batch=batch,
                cores=cores,
                megabytes_per_s=megabytes_per_s,
                field_megabytes=field_megabytes,
                decode_ms=decode_ms,
                augment_ms=augment_ms,
            )
        )
    lines = [
        f"{plan.samples_per_s:.1f} samples/s; {field_megabytes:g} MB a field, {decode_ms:g} ms to decode "
        f"it, {augment_ms:g} ms to cut a sample's crops",
        "visits    MB/s  requests/s  connections  decode cores  crop cores  pool GB  used  bottleneck",
    ]
    for need in plan.needs:
        lines.append(
            f"{need.visits:6} {need.megabytes_per_s:7.0f} {need.requests_per_s:11.0f} "
            f"{need.connections:12.0f} {need.decode_cores:13.2f} {need.augment_cores:11.2f} "
            f"{need.pool_gb:8.1f} {100 * need.data_share:4.0f}%  {need.bottleneck}"
        )
    return "\n".join([*lines, plan.advice])
