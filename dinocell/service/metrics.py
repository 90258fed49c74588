"""The figures of the service in the text format of Prometheus."""

from collections.abc import Mapping

_HELP = {
    "images_total": ("counter", "Images that were segmented."),
    "cells_total": ("counter", "Cells that were found in them."),
    "jobs_total": ("counter", "Jobs by how they ended."),
    "seconds_total": (
        "counter",
        "Seconds that jobs waited, and spent in reading, network and cells.",
    ),
    "queue_jobs": ("gauge", "Jobs that wait or run."),
}
_ALWAYS = (
    *("images_total", "cells_total"),
    *(f'jobs_total{{state="{state}"}}' for state in ("done", "failed", "cancelled")),
    *(f'seconds_total{{stage="{stage}"}}' for stage in ("wait", "read", "network", "cells")),
)


def prometheus_text(counters: Mapping[str, float], depths: Mapping[str, int]) -> str:
    """Counters by name with labels, and the queue by state, as one text; names start with `dinocell_`."""
    values = dict.fromkeys(_ALWAYS, 0.0) | dict(counters)
    values |= {f'queue_jobs{{state="{state}"}}': count for state, count in depths.items()}
    lines = []
    for family, (kind, text) in _HELP.items():
        lines += [f"# HELP dinocell_{family} {text}", f"# TYPE dinocell_{family} {kind}"]
        lines += [
            f"dinocell_{name} {value:.9g}"
            for name, value in sorted(values.items())
            if name.partition("{")[0] == family
        ]
    return "\n".join(lines) + "\n"
