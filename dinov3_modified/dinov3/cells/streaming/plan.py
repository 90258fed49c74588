"""What streaming needs, by arithmetic: bytes, requests, cores against visits per field (ours)."""

import math
from dataclasses import dataclass

from dinov3.cells.streaming.order import FieldOrder

_VISITS = (1, 2, 4, 8, 16, 32, 64)
_AHEAD = 48  # as StreamOptions.ahead
_NETWORK_SHARE = 0.8  # of a line that a single program gets in practice
_WINDOWS_PER_FIELD = 16  # disjoint 256 px windows of a 1080 px field


@dataclass(frozen=True)
class Need:
    """Of one number of visits per field."""

    visits: int  # K
    megabytes_per_s: float  # from the store
    requests_per_s: float
    connections: float  # requests at once
    decode_cores: float  # busy CPU cores
    augment_cores: float
    pool_gb: float  # memory of decoded fields, of each process (GPU), at its highest
    data_share: float  # of the network or the cores, whichever is used more; above 1 the step waits
    bottleneck: str  # network or cores


@dataclass(frozen=True)
class Workload:
    """A training step, and the machine and line that feed it; ValueError for a number out of range."""

    step_seconds: float  # duration of one iteration
    batch: int  # samples of it on this node, over all its GPUs
    cores: float  # CPU cores for data
    megabytes_per_s: float  # of the line to the store, 10**6 bytes
    field_megabytes: float = 12.35  # of all files of a field, as in the JUMP pilot
    channels: int = 5  # files of a field
    decode_ms: float = 30.0  # CPU time to decode a field
    augment_ms: float = 16.1  # CPU time of a sample's crops (benchmarks/multiview_augmentation.py)
    first_byte_s: float = 0.2  # until a request is answered
    spread: int = 8  # time steps between two visits of a field
    field_pool_megabytes: float = 11.7  # of a decoded field

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            zero = name in ("decode_ms", "augment_ms", "first_byte_s", "field_pool_megabytes")
            if not (0 <= value < math.inf) or (value == 0 and not zero):
                least = "0 or more" if zero else "positive"
                raise ValueError(f"`{name}` must be {least}, got {value}: give such a number")

    @property
    def samples_per_s(self) -> float:
        """What training consumes."""
        return self.batch / self.step_seconds

    def need(self, visits: int) -> Need:
        """What the step takes when each fetched field is visited so often."""
        fields = self.samples_per_s / visits
        network = fields * self.field_megabytes
        requests = fields * self.channels
        decode = fields * self.decode_ms / 1000
        augment = self.samples_per_s * self.augment_ms / 1000
        by_network = network / (_NETWORK_SHARE * self.megabytes_per_s)
        by_cores = (decode + augment) / self.cores
        pooled = FieldOrder(1, visits=visits, spread=self.spread).pool_fields(_AHEAD)
        return Need(
            visits,
            network,
            requests,
            requests * self.first_byte_s,
            decode,
            augment,
            pooled * self.field_pool_megabytes / 1000,
            max(by_network, by_cores),
            "network" if by_network >= by_cores else "cores",
        )


@dataclass(frozen=True)
class Plan:
    """The needs of a workload by visits, and what to take."""

    work: Workload
    needs: list[Need]
    recommended: int | None  # the fewest visits that keep up, None where none does
    advice: str  # one sentence

    def text(self) -> str:
        """The needs as a table, and the advice."""
        work = self.work
        lines = [
            f"{work.samples_per_s:.1f} samples/s; {work.field_megabytes:g} MB a field, "
            f"{work.decode_ms:g} ms to decode it, {work.augment_ms:g} ms to cut a sample's crops",
            "visits    MB/s  requests/s  connections  decode cores  crop cores  pool GB  used  bottleneck",
        ]
        for need in self.needs:
            lines.append(
                f"{need.visits:6} {need.megabytes_per_s:7.0f} {need.requests_per_s:11.0f} "
                f"{need.connections:12.0f} {need.decode_cores:13.2f} {need.augment_cores:11.2f} "
                f"{need.pool_gb:8.1f} {100 * need.data_share:4.0f}%  {need.bottleneck}"
            )
        return "\n".join([*lines, self.advice])


def make_plan(work: Workload) -> Plan:
    """Needs of a training step for several numbers of visits, and the fewest that keep up."""
    needs = [work.need(visits) for visits in _VISITS]
    fitting = [need for need in needs if need.data_share <= 1]
    if fitting:
        best = fitting[0]
        advice = (
            f"take visits={best.visits}: {best.megabytes_per_s:.0f} MB/s, {best.requests_per_s:.0f} "
            f"requests/s, {best.decode_cores + best.augment_cores:.1f} of {work.cores:g} cores; the narrowest "
            f"is the {best.bottleneck} at {100 * best.data_share:.0f} %"
        )
        if best.visits > _WINDOWS_PER_FIELD:
            advice += f"; a field has {_WINDOWS_PER_FIELD} disjoint 256 px windows: pixels repeat"
        return Plan(work, needs, best.visits, advice)
    best = min(needs, key=lambda need: need.data_share)
    cure = (
        "more cores, or multiview.photometrics=device"
        if best.bottleneck == "cores"
        else "a faster line, packed shards (`dinocell jump pack`), or a local copy"
    )
    advice = (
        f"no number of visits keeps up: with visits={best.visits} a step takes "
        f"{best.data_share * work.step_seconds:.2f} s instead of {work.step_seconds:g} s, held up by the "
        f"{best.bottleneck}; get {cure}"
    )
    return Plan(work, needs, None, advice)
