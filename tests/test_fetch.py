"""Fetching against a real, faulty HTTP server on loopback: what resumes, what is tried again, what is refused, and what is left behind."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import zipfile
from email.utils import formatdate
from pathlib import Path

import pytest
from faulty_server import Answer, Site, long_ago, serving

import suasion
from suasion.corpora import fetch as fetching
from suasion.corpora import transfer
from suasion.corpora.fetch import fetch
from suasion.corpora.published import CORPORA
from suasion.corpora.stage import bundled_path
from suasion.errors import UsageError, UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
QUICK = transfer.Patience(attempts=4, pause=0.01, longest=2, timeout=20)
FILES = {"conversations.json", "corpus.json", "index.json", "speakers.json", "utterances.jsonl"}


def packed(folder: Path, prefix: str, padding: int = 0) -> bytes:
    """A folder as ConvoKit zips it: below a folder, with pickles and a Mac's shadows. padding: bytes that do not compress."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}/", "")
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{prefix}/{file.name}")
            archive.writestr(f"__MACOSX/{prefix}/._{file.name}", "shadow")
        archive.writestr(f"{prefix}/parsed.bin", b"pickle" + os.urandom(padding), zipfile.ZIP_STORED)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus():
    """The bundled PersuasionForGood-like corpus as an archive of about 1.3 MB."""
    return packed(bundled_path("p4g"), "persuasionforgood-corpus", 1_250_000)


@pytest.fixture
def site(corpus):
    with serving(Site(corpus)) as site:
        yield site


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def get(site: Site, **options):
    return fetch("p4g", source=site.url, patience=QUICK, **options)


def whole(folder: Path) -> bool:
    """Whether a folder holds exactly the bundled corpus."""
    bundled = bundled_path("p4g")
    return {file.name for file in folder.iterdir()} == FILES and all(
        (folder / name).read_bytes() == (bundled / name).read_bytes() for name in FILES
    )


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


DONE = {
    "data",
    "data/persuasionforgood-corpus.fetch.json",
    "data/persuasionforgood-corpus",
    *(f"data/persuasionforgood-corpus/{name}" for name in FILES),
}


def test_a_corpus_arrives_is_recorded_and_is_there_from_then_on(here, site, corpus):
    got = get(site)
    assert everything(here) == DONE
    assert whole(got.folder)
    record = json.loads((here / "data/persuasionforgood-corpus.fetch.json").read_text())
    assert (record["sha256"], record["bytes"], record["source"]) == (hashlib.sha256(corpus).hexdigest(), len(corpus), site.url)
    assert set(record["files"]) == FILES
    assert record["counts"] == {"utterances": 557, "conversations": 42, "speakers": 76}
    assert [asked.status for asked in site.asked] == [200]
    again = get(site)
    assert again.seen == "there"
    assert again.record == got.record
    assert len(site.asked) == 1, "nothing was asked for"
    assert get(site, again=True).seen == "again"
    assert everything(here) == DONE


CUT = 500_000


@pytest.mark.parametrize(
    "fault",
    [
        Answer(cut=CUT),
        Answer(cut=CUT, how="reset"),
        Answer(cut=CUT, how="hang"),
        Answer(cut=CUT, etag=None, modified=long_ago()),
    ],
    ids=["closed", "reset", "timeout", "last-modified"],
)
def test_an_interrupted_transfer_brings_only_the_rest(here, site, corpus, fault):
    site.answers = [fault, dataclasses.replace(fault, cut=None)]
    patience = dataclasses.replace(QUICK, timeout=1) if fault.how == "hang" else QUICK
    assert whole(fetch("p4g", source=site.url, patience=patience).folder)
    second = site.asked[1]
    assert len(site.asked) == 2
    start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= CUT, "a reset may lose what was under way"
    assert start == CUT or fault.how == "reset"
    assert second.headers["if-range"] == (fault.etag or fault.modified)
    assert (second.status, second.sent) == (206, len(corpus) - start)
    assert everything(here) == DONE


@pytest.mark.parametrize(
    ("answers", "statuses"),
    [
        ([Answer(503), Answer(503), Answer()], [503, 503, 200]),
        ([Answer(cut=CUT), Answer(502), Answer()], [200, 502, 206]),
        ([Answer(cut=CUT), Answer(ranges=False)], [200, 200]),  # the server knows no ranges
        ([Answer(cut=CUT, etag='W/"weak"'), Answer()], [200, 200]),  # nothing to tell versions apart by
        ([Answer(cut=CUT, etag=None), Answer()], [200, 200]),
        ([Answer(cut=CUT, etag=None, modified=formatdate(usegmt=True)), Answer()], [200, 200]),  # changed this very second
        ([Answer(cut=CUT, body=b"x" * 900_000, etag='"old"'), Answer()], [200, 200]),  # another file by now
        ([Answer(cut=CUT, body=b"x" * 900_000, etag='"old"'), Answer(conditions=False), Answer()], [200, 206, 200]),
        ([Answer(cut=CUT), Answer(shift=7), Answer()], [200, 206, 200]),  # another range than asked for
        ([Answer(cut=900_000, body=b"x" * 900_001), Answer(body=b"y" * 9, conditions=False), Answer()], [200, 416, 200]),
        ([Answer(chunked=True, cut=CUT), Answer(chunked=True)], [200, 206]),
        ([Answer(chunked=True)], [200]),
        ([Answer(announce=None)], [200]),
    ],
)  # fmt: skip
def test_faults_that_pass_end_with_the_right_bytes(here, corpus, answers, statuses):
    with serving(Site(corpus, answers)) as site:
        assert whole(get(site).folder)
        assert [asked.status for asked in site.asked] == statuses
    assert everything(here) == DONE


def test_retry_after_is_honoured_and_too_long_a_wait_is_refused(here, site):
    site.answers = [Answer(429, (("Retry-After", "1"),)), Answer()]
    start = time.monotonic()
    assert whole(get(site).folder)
    assert time.monotonic() - start >= 1
    site.answers = [Answer(503, (("Retry-After", formatdate(time.time() + 3030, usegmt=True)),))]
    with pytest.raises(UserError, match="asks to wait 50 min"):
        get(site, again=True)
    assert everything(here) == DONE


def test_giving_up_keeps_what_came_and_the_next_fetch_goes_on(here, site, corpus):
    """Announced longer than it is: the connection always ends too early."""
    site.answers = [Answer(cut=CUT), Answer(cut=0)]
    with pytest.raises(UserError, match=r"the connection ended at 0\.5 MB of 1\.3 MB \(4 attempts\)\. 0\.5 MB of it are kept"):
        get(site)
    assert everything(here) == {"data", "data/persuasionforgood-corpus.part", "data/persuasionforgood-corpus.part.json"}
    site.answers, site.asked = [Answer()], []
    assert whole(get(site).folder)
    assert [asked.sent for asked in site.asked] == [len(corpus) - CUT]
    assert everything(here) == DONE


def test_progress_earns_new_attempts(here):
    """Six cuts, each after more than a MiB: more than `attempts` in all, but never that many in a row without progress."""
    step = transfer.STEP + 1
    body = packed(bundled_path("p4g"), "c", 6 * step)
    with serving(Site(body, [*[Answer(cut=step)] * 6, Answer()])) as site:
        assert whole(get(site).folder)
        assert len(site.asked) == 7


def test_an_announced_length_that_is_wrong(here, site, corpus):
    site.answers = [Answer(announce=100)]
    with pytest.raises(UserError, match=r"\(4 attempts\)"):
        get(site)
    site.answers = [Answer(announce=-100)]
    with pytest.raises(UserError, match="truncated or damaged"):
        get(site)
    assert everything(here) == set()


@pytest.mark.parametrize("status", [403, 404, 410, 204])
def test_a_refusal_is_not_tried_again(here, site, status):
    site.answers = [Answer(status)]
    with pytest.raises(UserError, match=f"answered {status}"):
        get(site)
    assert len(site.asked) == 1
    assert everything(here) == set()


@pytest.mark.parametrize("announce", [0, None], ids=["announced", "not announced"])
def test_more_than_the_limit_is_refused(here, site, monkeypatch, announce):
    small = dataclasses.replace(CORPORA["p4g"].limits, packed=600_000)
    monkeypatch.setitem(CORPORA, "p4g", dataclasses.replace(CORPORA["p4g"], limits=small))
    site.answers = [Answer(announce=announce)]
    with pytest.raises(UserError, match=r"sends more than 0\.6 MB"):
        get(site)
    assert everything(here) == set()


def test_a_wrong_checksum_leaves_nothing(here, site, corpus):
    with pytest.raises(UserError, match=f"SHA-256 {hashlib.sha256(corpus).hexdigest()}, expected {'0' * 64}"):
        get(site, sha256="0" * 64)
    assert everything(here) == set()
    assert whole(get(site, sha256=hashlib.sha256(corpus).hexdigest().upper()).folder)


def test_a_pinned_checksum_holds_for_the_published_address_only(here, site, corpus, monkeypatch):
    pinned = dataclasses.replace(CORPORA["p4g"], url=site.url, sha256="1" * 64)
    monkeypatch.setitem(CORPORA, "p4g", pinned)
    with pytest.raises(UserError, match=f"expected {'1' * 64}"):
        fetch("p4g", patience=QUICK)
    assert everything(here) == set()
    (here / "own.zip").write_bytes(corpus)
    assert whole(fetch("p4g", source="own.zip").folder)


def test_what_was_recorded_is_enforced_whatever_the_source(here, site, corpus):
    folder = get(site).folder
    changed = here / "changed"
    shutil.copytree(folder, changed)
    (changed / "utterances.jsonl").write_text((changed / "utterances.jsonl").read_text().replace("the", "teh", 1))
    before = everything(here)
    site.answers = [Answer(body=packed(changed, "persuasionforgood-corpus"))]
    for source in (site.url, str(changed)):
        with pytest.raises(UserError, match=r"1 of 5 files differ, the first utterances\.jsonl"):
            fetch("p4g", source=source, again=True, patience=QUICK)
    shutil.rmtree(folder)  # the record stands beside the folder, not in it
    with pytest.raises(UserError, match=r"delete .*persuasionforgood-corpus\.fetch\.json"):
        get(site)
    assert everything(here) == {name for name in before if not name.startswith("data/persuasionforgood-corpus/")} - {
        "data/persuasionforgood-corpus"
    }
    repacked = packed(bundled_path("p4g"), "elsewhere")  # other bytes, the same files
    assert repacked != corpus
    (here / "mirror.zip").write_bytes(repacked)
    assert fetch("p4g", source="mirror.zip").seen == "again"
    assert whole(folder)


def test_a_folder_that_is_there_but_differs(here, site):
    folder = get(site).folder
    (folder / "speakers.json").write_text("{}")
    (folder / "my-notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"speakers\.json missing or changed\. --again"):
        get(site)
    got = get(site, again=True)
    assert whole(got.folder)
    assert got.moved == folder.with_name("persuasionforgood-corpus.old")
    assert (got.moved / "my-notes.txt").read_text() == "mine"
    assert (got.moved / "speakers.json").read_text() == "{}"
    with pytest.raises(UserError, match="is there already, from"):
        fetch("p4g", source=str(got.moved))
    with pytest.raises(UserError, match="not 222222"):
        get(site, sha256="2" * 64)
    with pytest.raises(UserError, match="is the record of p4g, not of cmv"):
        fetch("cmv", to=folder)


def test_a_folder_that_fetch_did_not_make_is_left_alone_or_adopted(here, site):
    folder = here / "data" / "persuasionforgood-corpus"
    shutil.copytree(bundled_path("p4g"), folder)
    (folder / "my-notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by fetch"):
        get(site)
    got = get(site, again=True)
    assert (got.moved, got.seen) == (None, "new")
    assert everything(here) == DONE | {"data/persuasionforgood-corpus/my-notes.txt"}


def test_a_broken_record_is_not_taken_for_none(here, site):
    get(site)
    (here / "data/persuasionforgood-corpus.fetch.json").write_text('{"corpus": "p4g"}')
    with pytest.raises(UserError, match="is not a record of fetch"):
        get(site, again=True)


def test_only_one_fetch_writes_a_folder(here, site):
    with (
        fetching._working(here / "data" / "persuasionforgood-corpus"),
        pytest.raises(UserError, match="another fetch is writing"),
    ):
        get(site)
    assert everything(here) == set()


def test_what_a_killed_fetch_left_while_unpacking_is_cleared(here, site):
    stale = here / "data" / "persuasionforgood-corpus.unpacking"
    stale.mkdir(parents=True)
    (stale / "utterances.jsonl").write_text("half")
    assert whole(get(site).folder)
    assert everything(here) == DONE


def test_a_folder_that_cannot_be_made(here, site):
    (here / "data").write_text("a file")
    with pytest.raises(UserError, match="cannot be made"):
        get(site)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://example.org/corpus.zip", "plain http lets anybody"),
        ("ftp://example.org/corpus.zip", "only https"),
        ("file:///etc/passwd", "only https"),
        ("https://", "only https"),
        ("https://me:secret@example.org/corpus.zip", "leave name and password out"),
        ("https://example.org:port/corpus.zip", "is not an address"),
        ("nowhere.zip", "no such file"),
    ],
)
def test_sources_that_are_not_fetched_from(here, source, message):
    with pytest.raises(UsageError, match=message) as caught:
        fetch("p4g", source=source)
    assert "secret" not in str(caught.value)
    assert everything(here) == set()


def test_plain_http_needs_a_known_checksum():
    transfer.check_url("http://example.org/corpus.zip", known=True)
    for host in ("127.0.0.1", "127.1.2.3", "[::1]", "localhost"):
        transfer.check_url(f"http://{host}:80/corpus.zip", known=False)
    for host in ("128.0.0.1", "localhost.example.org", "127.0.0.1.example.org", "2130706433"):
        with pytest.raises(UsageError):
            transfer.check_url(f"http://{host}/corpus.zip", known=False)


@pytest.mark.parametrize("target", ["http://example.org/corpus.zip", "ftp://example.org/corpus.zip", "file:///etc/passwd"])
def test_redirects_elsewhere_are_refused(here, site, target):
    site.answers = [Answer(302, (("Location", target),))]
    with pytest.raises(UserError, match=r"302|is not followed"):
        get(site)
    assert len(site.asked) == 1
    assert everything(here) == set()


def test_redirects_are_followed_also_on_resuming_and_not_in_circles(here, site):
    moved = Answer(302, (("Location", "/elsewhere.zip"),))
    site.answers = [moved, Answer(cut=CUT), moved, Answer()]
    assert whole(get(site).folder)
    assert [(asked.path, asked.status) for asked in site.asked] == [
        ("/corpus.zip", 302), ("/elsewhere.zip", 200), ("/corpus.zip", 302), ("/elsewhere.zip", 206)
    ]  # fmt: skip
    site.answers = [Answer(302, (("Location", "/corpus.zip"),))]
    with pytest.raises(UserError, match="answered 302"):
        get(site, again=True)


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that nobody trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=x",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


def test_https_checks_certificates_and_never_leads_to_http(tmp_path, monkeypatch, certificate, corpus):
    context, cert = certificate
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving(Site(corpus), tls=context) as safe, serving(Site(corpus)) as plain:
        with pytest.raises(UserError, match="certificate is not valid here"):
            get(safe)
        assert safe.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        safe.answers = [Answer(302, (("Location", plain.url),))]
        with pytest.raises(UserError, match="leads from https to http"):
            get(safe, sha256=hashlib.sha256(corpus).hexdigest())
        assert plain.asked == []
        assert everything(tmp_path / "work") == set()
        safe.answers = [Answer(cut=CUT), Answer()]
        assert whole(get(safe).folder)
        assert [asked.status for asked in safe.asked[-2:]] == [200, 206]


def test_this_machine_is_not_asked_through_a_proxy(here, site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert whole(get(site).folder)


def test_a_server_that_is_not_there(here, site):
    unused = site.url.replace("127.0.0.1", "127.0.0.99")
    with pytest.raises(UserError, match=r"the connection broke .*\(4 attempts\)"):
        fetch("p4g", source=unused, patience=QUICK)
    with pytest.raises(UserError, match=r"no such server, or no network|the connection broke"):
        fetch("p4g", source="https://does-not-exist.invalid/corpus.zip", patience=QUICK)
    assert everything(here) == set()


def test_nothing_secret_of_an_address_is_recorded(here, site):
    got = fetch("p4g", source=f"{site.url}?token=secret", patience=QUICK)
    assert got.record.source == site.url
    assert "secret" not in got.record_file.read_text()
    assert site.asked[0].path == "/corpus.zip?token=secret"


# The command line


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(suasion.__file__).parents[1])}  # a relative one ends with the working folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "suasion", "fetch", *arguments]


def flat(text: str) -> str:
    return " ".join(text.split())


def test_kill_9_in_mid_transfer_and_the_next_fetch_brings_only_the_rest(here, site, corpus):
    site.answers = [Answer(cut=CUT, how="hang"), Answer()]
    part = here / "data" / "persuasionforgood-corpus.part"
    process = subprocess.Popen(command("p4g", "--source", site.url), cwd=here, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while transfer.size_of(part) < CUT and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert part.stat().st_size == CUT
    done = subprocess.run(command("p4g", "--source", site.url), cwd=here, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(asked.status, asked.sent) for asked in site.asked] == [(200, CUT), (206, len(corpus) - CUT)]
    assert everything(here) == DONE
    assert whole(here / "data" / "persuasionforgood-corpus")
    said = flat(done.stdout)
    for words in (
        "licence: Apache-2.0",
        "going on from 0.5 MB",
        "557 utterances, 42 conversations, 76 speakers (published: 20,932 utterances",
        f"sha256 {hashlib.sha256(corpus).hexdigest()}: recorded in persuasionforgood-corpus.fetch.json",
        f"--set corpus.sources.0.path={here}/data/persuasionforgood-corpus",
    ):
        assert words in said, said


FULL = """
mkdir "$1" && mount -t tmpfs -o size=900k tmpfs "$1" || exit 77
disk=$1; shift
"$@" 2>&1; echo "full: $?"
mount -o remount,size=16m "$disk"
"$@" 2>&1; echo "freed: $?"
"""


def test_a_full_disk_keeps_the_part(here, site, corpus):
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs mount namespaces")
    disk = here / "disk"
    arguments = command("p4g", "--source", site.url, "--to", str(disk / "corpus"))
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", str(disk), *arguments],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs mount namespaces")
    full, freed = done.stdout.split("full: ")
    assert "no space left on the device" in full, done.stdout
    assert freed.startswith("1\n")
    assert freed.rstrip().endswith("freed: 0"), done.stdout
    second = site.asked[1]
    assert second.status == 206
    assert second.sent < len(corpus)


def test_the_command_teaches_and_exits_as_it_should(here):
    told = flat(subprocess.run(command("--help"), env=ENVIRONMENT, capture_output=True, text=True).stdout)
    for words in ("73 MB", "never to be passed on", "Apache-2.0", "CC-BY 4.0", "--source", "--sha256", "--again"):
        assert words in told, told
    wrong = subprocess.run(
        command("p4g", "--source", "https://u:secret@example.org/x.zip"),
        cwd=here,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert "secret" not in wrong.stdout + wrong.stderr
    assert "Traceback" not in wrong.stdout + wrong.stderr
    assert everything(here) == set()


# The corpora themselves


def ukp_repository(prefix: str = "acl2016-convincing-arguments-ca9d24e") -> dict[str, str]:
    """The layout of UKPLab's repository with two made-up pairs a file."""
    files = {f"{prefix}/README.md": "readme", f"{prefix}/data/readme.txt": "readme"}
    for topic in range(16):
        for side in ("yes", "no"):
            name = f"topic-{topic}-_{side}"
            files[f"{prefix}/data/UKPConvArg1Strict-CSV/{name}.csv"] = (
                "#id\tlabel\ta1\ta2\n1_2\ta1\tlong\tshort\n3_4\ta2\tthis\tthat\n"
            )
            files[f"{prefix}/data/UKPConvArg1-Ranking-CSV/{name}.csv"] = "#id\trank\targument\n1\t.5\tlong\n"
            files[f"{prefix}/data/UKPConvArg1Strict-XML/{name}.xml"] = "<list/>"
    return files


def test_ukp_is_found_in_its_repository(here):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in ukp_repository().items():
            archive.writestr(name, text)
    with serving(Site(buffer.getvalue(), [Answer(chunked=True, etag=None)])) as site:  # as GitHub sends it
        got = fetch("ukp", source=site.url, patience=QUICK)
    assert got.record.counts == {"pairs": 64, "topics": 16}
    assert len(list(got.folder.iterdir())) == 32
    assert got.folder == here / "data" / "ukpconvarg1"
    assert any("train: {kind: ukp" in line for line in got.lines())


def test_another_corpus_is_not_taken_for_this_one(here, corpus):
    (here / "p4g.zip").write_bytes(corpus)
    with pytest.raises(UserError, match="no utterance has 'success'"):
        fetch("cmv", source="p4g.zip")
    with pytest.raises(UserError, match="expected one folder UKPConvArg1Strict-CSV"):
        fetch("ukp", source="p4g.zip")
    (here / "one").mkdir()
    (here / "one" / "a_b.csv").write_text("1_2\ta1\tlong\tshort\n")
    with pytest.raises(UserError, match=r"expected the 32 csv files .* in the archive, found 1"):
        fetch("ukp", source="one")
    assert not (here / "data").exists()


def test_every_published_address_is_https_and_within_its_own_rules():
    for corpus in CORPORA.values():
        transfer.check_url(corpus.url, known=False)
        assert corpus.url.startswith("https://")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real corpora are not at ../shared/data; the bundled ones are tested")
@pytest.mark.parametrize(("name", "folder"), [("p4g", "persuasionforgood-corpus"), ("ukp", "ukpconvarg1")])
def test_the_real_corpora_have_the_published_counts(here, name, folder):
    got = fetch(name, source=str(DATA / folder))
    assert got.record.counts == CORPORA[name].published
    assert "(as published)" in got.lines()[0]
