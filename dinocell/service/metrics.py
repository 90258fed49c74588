"""The figures of the service, in the text format of Prometheus and by their names at Weights & Biases."""

import re
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


def _figures(counters: Mapping[str, float], depths: Mapping[str, int]) -> dict[str, float]:
    values = dict.fromkeys(_ALWAYS, 0.0) | dict(counters)
    return values | {f'queue_jobs{{state="{state}"}}': count for state, count in depths.items()}


def production_figures(
    counters: Mapping[str, float], depths: Mapping[str, int]
) -> dict[str, float]:
    """The same figures by names such as `production/jobs/failed`."""
    return {
        re.sub(r'^([a-z]+)_[a-z]+(?:\{[a-z]+="([a-z]+)"\})?$', _name, name): value
        for name, value in _figures(counters, depths).items()
    }


def _name(found: re.Match[str]) -> str:
    return "/".join(filter(None, ("production", *found.groups())))


def prometheus_text(counters: Mapping[str, float], depths: Mapping[str, int]) -> str:
    """Counters by name with labels, and the queue by state, as one text; names start with `dinocell_`."""
    values = _figures(counters, depths)
    lines = []
    for family, (kind, text) in _HELP.items():
        lines += [f"# HELP dinocell_{family} {text}", f"# TYPE dinocell_{family} {kind}"]
        lines += [
            f"dinocell_{name} {value:.9g}"
            for name, value in sorted(values.items())
            if name.partition("{")[0] == family
        ]
    return "\n".join(lines) + "\n"
