"""Site files: every key is documented, wrong ones are refused, text stays what was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from dinocell.cluster import site
from dinocell.cluster.site import SiteProfile, find_site, load_site, minutes_of
from dinocell.errors import ConfigError

SITES = Path(__file__).parents[3] / "slurm" / "sites"
FIELDS = [item.name for item in dataclasses.fields(SiteProfile)]


def site_file(folder: Path, text: str) -> str:
    path = folder / "here.yaml"
    path.write_text(text)
    return str(path)


def test_the_example_has_every_key_with_its_default():
    # BaseLoader keeps the text, so that this reading shares nothing with the one that is tested.
    written = yaml.load((SITES / "example.yaml").read_text(), Loader=yaml.BaseLoader)
    assert list(written) == FIELDS
    defaults = SiteProfile()
    for key, text in written.items():
        value = getattr(defaults, key)
        wanted = {None: "null", (): []}.get(value, str(value)) if value != {} else {}
        assert text == wanted, key
    assert load_site(str(SITES / "example.yaml")) == defaults == load_site(None)


def test_the_site_with_a100s():
    site = load_site(str(SITES / "a100.yaml"))
    assert (site.partition, site.gres, site.gpus_per_node, site.tasks) == (
        "gpu",
        "gpu:a100:1",
        1,
        1,
    )
    assert (site.time, site.mem, site.cpus_per_gpu) == ("24:00:00", "96G", 12)
    assert site.environment == {"OMP_NUM_THREADS": "1"}


def test_an_unknown_key_names_the_nearest_and_all(tmp_path):
    with pytest.raises(ConfigError, match="did you mean partition") as caught:
        load_site(site_file(tmp_path, "partitoin: gpu\n"))
    for name in FIELDS:
        assert name in str(caught.value)
    assert "here.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean array_parallelism"):
        load_site(None, ["array_paralelism=3"])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("time: 24:00:00", "time", "24:00:00"),  # 86400 in YAML 1.1
        ("time: 12:30", "time", "12:30"),  # 750 in YAML 1.1
        ("time: 90", "time", "90"),
        ("time: 2-12", "time", "2-12"),
        ("account: 1234", "account", "1234"),
        ("partition: 7", "partition", "7"),
        ("mem: 0", "mem", "0"),
        ("nodes: 2", "nodes", 2),
        ("nice: -5", "nice", -5),
        ("setup: [module load cuda, 'echo 24:00:00']", "setup", ("module load cuda", "echo 24:00:00")),
        (
            "environment: {N: 8, SHARE: 0.5, A: true, B: false, UNTIL: 12:30:00}",
            "environment",
            {"N": "8", "SHARE": "0.5", "A": "true", "B": "false", "UNTIL": "12:30:00"},
        ),
        ("extra: {licenses: matlab, exclusive: true}", "extra",
         {"licenses": "matlab", "exclusive": "true"}),
    ],
)  # fmt: skip
def test_values_stay_what_was_written(tmp_path, text, key, value):
    site = load_site(site_file(tmp_path, text + "\n"))
    assert getattr(site, key) == value
    others = dataclasses.replace(SiteProfile(), **{key: value})
    assert site == others


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("account=0123", "account", "0123"),
        ("account=089", "account", "089"),
        ("environment.MODE=0755", "environment", {"MODE": "0755"}),
    ],
)
def test_leading_zeros_stay(override, key, value):
    assert getattr(load_site(None, [override]), key) == value


@pytest.mark.parametrize(
    ("text", "environment"),
    [("{CACHE: off}", {"CACHE": "off"}), ("{ON: 1}", {"ON": "1"}), ("{A: no}", {"A": "no"})],
)
def test_words_of_the_environment_stay(tmp_path, text, environment):
    assert load_site(site_file(tmp_path, f"environment: {text}\n")).environment == environment


@pytest.mark.parametrize("key", ["environment.EMPTY", "extra.exclusive"])
def test_an_empty_value_in_a_section_is_empty(key):
    section, _, name = key.partition(".")
    assert getattr(load_site(None, [f"{key}="]), section) in ({}, {name: ""})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["nodes=0"], "nodes` must be at least 1, got 0"),
        (["cpus_per_gpu=0"], "cpus_per_gpu` must be at least 1"),
        (["max_stalled_starts=0"], "max_stalled_starts` must be at least 1"),
        (["array_parallelism=-1"], "array_parallelism` must be at least 1, got -1"),
        (["tasks_per_node=0"], "tasks_per_node` must be at least 1"),
        (["signal_ahead_s=9"], "`signal_ahead_s` must be at least 10, got 9"),
        (["time=2"], "`time` must be longer than `signal_ahead_s` (120 s), got 2"),
        (["time=soon"], "`time` must be like 24:00:00, 2-00:00:00 or minutes"),
        (["gres=gpu:a100:many"], "`gres` must look like gpu:a100:1, got 'gpu:a100:many'"),
        (["mem=64GB"], "`mem` must be a number with K, M, G or T, got '64GB'"),
        (["environment.A-B=1"], "`environment` must have names of variables, got 'A-B'"),
        (["extra.--licenses=matlab"], "without dashes in front"),
        (['comment="a\\nrm b"'], "comment` must be one line"),
        (['extra.licenses="a\\nb"'], "extra.licenses` must be one line"),
        (["mem=4G", "extra.mem-per-cpu=1G"], "Memory must be given once, got `mem` and mem-per-cpu"),
        (["nodes=many"], "nodes` must be of type int"),
        (["nodes=1.5"], "nodes` must be of type int"),
        (["setup=module load cuda"], "setup` must be of type tuple[str, ...]"),
        (["environment=5"], "environment` must be of type dict[str, str]"),
        (["partition=[true]"], "partition` must be of type str"),
        (["partition=true"], "partition` must be of type str, got True"),
        (["setup=[{export MSG: hello}]"], "setup[0]` must be of type str, got {'export MSG': 'hello'}"),
        (["environment.X.Y=3"], "environment.X` must be of type str, got {'Y': '3'}"),
        (["extra.licenses=[a,b]"], "extra.licenses` must be of type str, got ['a', 'b']"),
        (["partition"], "An override must be key=value, got 'partition'"),
        (["=gpu"], "An override must be key=value"),
        (["nodes=2", "nodes.more=1"], "nodes.more must lead to a key"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)  # fmt: skip
def test_wrong_values_are_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        load_site(None, overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)  # what to do


def test_the_least_that_is_allowed():
    site = load_site(
        None,
        ["nodes=1", "cpus_per_gpu=1", "max_stalled_starts=1", "array_parallelism=1",
         "tasks_per_node=1", "signal_ahead_s=10", "time=0:11", "mem=1", "gres=gpu"],
    )  # fmt: skip
    assert (site.tasks_per_node, site.signal_ahead_s, site.gpus_per_node) == (1, 10, 1)
    with pytest.raises(ConfigError, match="`time` must be longer"):
        load_site(None, ["signal_ahead_s=10", "time=0:10"])


def test_an_override_that_is_not_yaml():
    with pytest.raises(ConfigError, match="partition"):
        load_site(None, ["partition=[a"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partition: [a\n", "must be YAML"),
        ("- partition\n", "must be a mapping of keys, got list"),
        ("nothing at all\n", "must be a mapping of keys, got str"),
    ],
)
def test_files_that_are_no_site(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_site(site_file(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("30:00", 30),
        ("1:30", 1.5),  # minutes:seconds
        ("24:00:00", 1440),
        ("1:02:30", 62.5),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("2-12:30:30", 3630.5),
        ("0-0:1", 1),
        (" 5 ", 5),
    ],
)
def test_minutes(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "1:2:3:4", "-5", "2-", "1.5", "1h", "1::2", "1-1-1"])
def test_what_is_no_time(text):
    with pytest.raises(ConfigError, match="24:00:00"):
        minutes_of(text)


# --- where a site is found ---


@pytest.fixture
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """The working folder's sites, those of DINOCELL_SITES, and the user's, with one file each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOCELL_SITES", str(tmp_path / "group"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folders = {
        "work": Path("slurm/sites"),
        "group": tmp_path / "group",
        "user": tmp_path / "config" / "dinocell" / "sites",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / f"of_{name}.yaml").write_text("partition: gpu\n")
    return folders


def test_sites_are_found_by_path_and_name(places, tmp_path):
    assert find_site(None) is None
    assert find_site("") is None
    for name, folder in places.items():
        assert find_site(f"of_{name}") == folder / f"of_{name}.yaml"
    given = tmp_path / "group" / "of_group.yaml"
    assert find_site(str(given)) == given


def test_the_first_of_two_sites_of_one_name(places):
    for folder in places.values():
        (folder / "same.yaml").write_text("nodes: 1\n")
    assert find_site("same") == places["group"] / "same.yaml"
    (places["group"] / "same.yaml").unlink()
    assert find_site("same") == places["work"] / "same.yaml"
    (places["work"] / "same.yaml").unlink()
    assert find_site("same") == places["user"] / "same.yaml"


def test_the_site_of_the_environment(places, monkeypatch):
    monkeypatch.setenv("DINOCELL_SITE", "of_user")
    assert find_site(None) == places["user"] / "of_user.yaml"
    assert find_site("of_work") == places["work"] / "of_work.yaml"
    assert load_site(None).partition == "gpu"


def test_the_users_folder_without_the_variable(places, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / ".config" / "dinocell" / "sites"
    folder.mkdir(parents=True)
    (folder / "homely.yaml").write_text("nodes: 3\n")
    assert load_site("homely").nodes == 3


def test_without_a_home_the_other_folders_count(places, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    assert load_site("of_group").partition
    with pytest.raises(ConfigError, match="of_group, of_work"):
        find_site("of_user")


@pytest.mark.parametrize("name", ["none_such", "none_such.yaml", "group/none_such.yaml"])
def test_an_unknown_site_names_the_known_ones(places, name):
    with pytest.raises(ConfigError, match="of_group, of_user, of_work") as caught:
        find_site(name)
    assert name in str(caught.value)


def test_no_site_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_site("a100").gres == "gpu:a100:1"  # of the checkout
    monkeypatch.setattr(site, "__file__", str(tmp_path / "a" / "b" / "site.py"))
    with pytest.raises(ConfigError, match="or a name \\(but no site was found\\), got 'a100'"):
        find_site("a100")


# --- changes ---


def test_overrides_replace_and_empty(tmp_path):
    name = site_file(
        tmp_path, "gres: gpu:a100:4\npartition: gpu\nenvironment: {A: 1, B: 2}\nqos: long\n"
    )
    site = load_site(
        name,
        ["gres=", "partition=long", "environment.B=3", "environment.C=x y", "extra.licenses=m",
         "setup=[echo a, echo b]", "time=12:00:00", "qos=null"],
    )  # fmt: skip
    assert (site.gres, site.partition, site.qos) == (None, "long", None)
    assert site.environment == {"A": "1", "B": "3", "C": "x y"}
    assert site.extra == {"licenses": "m"}
    assert site.setup == ("echo a", "echo b")
    assert site.time == "12:00:00"
    assert load_site(name, ["environment={}"]).environment == {}
    assert load_site(name, ["environment={Z: 1}"]).environment == {"Z": "1"}


@pytest.mark.parametrize(
    ("gres", "per_node", "after"),
    [
        (None, 0, "gpu:2"),
        ("gpu", 1, "gpu:2"),
        ("gpu:4", 4, "gpu:2"),
        ("gpu:a100", 1, "gpu:a100:2"),
        ("gpu:a100:4", 4, "gpu:a100:2"),
        ("gpu:nvidia_a100-sxm4.80gb:8", 8, "gpu:nvidia_a100-sxm4.80gb:2"),
        ("lscratch:100", 0, "gpu:2,lscratch:100"),
        ("gpu:a100:4,lscratch:100", 4, "gpu:a100:2,lscratch:100"),
    ],
)
def test_gpus(gres, per_node, after):
    site = SiteProfile(gres=gres, nodes=3)
    assert site.gpus_per_node == per_node
    assert site.tasks == 3 * max(per_node, 1)
    changed = site.with_gpus(2)
    assert (changed.gres, changed.gpus_per_node, changed.tasks) == (after, 2, 6)
    others = "lscratch:100" if gres and "lscratch" in gres else None
    assert (site.with_gpus(0).gres, site.with_gpus(0).tasks) == (others, 3)
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        site.with_gpus(-1)


@pytest.mark.parametrize(
    ("gres", "count"), [("gpu:2080ti:2", 2), ("gpu:3090:1", 1), ("gpu:1g.10gb:1", 1)]
)
def test_gpu_types_that_begin_with_a_digit(gres, count):
    assert SiteProfile(gres=gres).gpus_per_node == count


def test_tasks_per_node_goes_before_gpus():
    assert SiteProfile(gres="gpu:4", tasks_per_node=2, nodes=2).tasks == 4
    assert SiteProfile(tasks_per_node=3).tasks == 3
    assert SiteProfile().tasks == 1


def test_the_merging_takes_little():
    site = SiteProfile(
        partition="gpu", gres="gpu:a100:4,license:2", nodes=3, tasks_per_node=4, time="90",
        constraint="a100", cpus_per_gpu=12,
        extra={"licenses": "matlab", "mem-per-cpu": "4G", "exclusive": "", "gpu-bind": "closest"},
    )  # fmt: skip
    merging = site.for_merging()
    assert (merging.nodes, merging.tasks, merging.cpus_per_gpu) == (1, 1, 1)
    assert (merging.mem, merging.time, merging.gres) == ("4G", "90", "license:2")
    assert (merging.partition, merging.constraint) == ("gpu", None)
    assert merging.extra == {"licenses": "matlab"}
    assert SiteProfile(time="24:00:00").for_merging().time == "2:00:00"


def test_an_empty_file_is_the_clusters_defaults(tmp_path):
    assert load_site(site_file(tmp_path, "# nothing yet\n")) == SiteProfile()


def test_a_wrong_override_without_a_file_names_the_site():
    with pytest.raises(ConfigError, match=r"^Site: .*partition"):
        load_site(None, ["partion=gpu"])
