#!/bin/sh
# Test the plugin in versions of napari: `PYTHON=.venv/bin/python JOBS=2 try_napari.sh VERSION...`
# Each version gets an environment in that of PYTHON and shares its packages: torch alone has gigabytes.  Those
# of which napari needs another version are installed once more and are found first.
set -eu
cd "$(dirname "$0")/../.."
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
shared=$("$PYTHON" -c "$purelib")
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
if command -v xvfb-run >/dev/null; then
    screen="xvfb-run -a" QT_QPA_PLATFORM=xcb
else
    screen="" QT_QPA_PLATFORM=offscreen
fi
export QT_QPA_PLATFORM
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # the plugins of other packages may need another pydantic
for version; do
    home=$prefix/napari-$version
    if ! [ "$home/.done" -nt setup.py ]; then
        "$PYTHON" -m venv --clear --without-pip "$home"
        echo "import site; site.addsitedir('$shared')" > "$("$home/bin/python" -c "$purelib")/shared.pth"
        "$PYTHON" -m pip --disable-pip-version-check --python "$home/bin/python" install -q \
            --no-warn-conflicts "napari==$version" PyQt6 2> "$home/pip.log" || {
            cat "$home/pip.log" >&2
            grep -q "napari==$version (from versions: none)" "$home/pip.log" || exit 1
            echo "not tested: napari $version, because the package index has no napari (offline?)"
            continue
        }
        touch "$home/.done"
    fi
    $screen "$home/bin/python" -m pytest -W default -p xdist -p pytest_timeout -n "$JOBS" \
        tests/dinocell/napari_plugin
done
