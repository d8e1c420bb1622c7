"""alpaca/common/journal.py: what was appended is there whole, or not at all; damage is never passed over."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line_error, assert_user_error, run_script

from alpaca import UserError
from alpaca.common.journal import Journal, check_output

ENTRIES = [{"i": 0, "text": "plain"}, {"i": 1, "text": "line\nbreak \u2028 é \ud83d"}, {"i": 2, "text": None}]


def read(path) -> list[dict]:
    with Journal(path) as journal:
        return journal.entries


def test_entries_come_back_as_they_were(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append(ENTRIES[:2])
        journal.append(ENTRIES[2:])
    assert read(tmp_path / "j") == ENTRIES


def test_a_line_is_a_checksum_and_one_object(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append([{"i": 0}])
    assert (tmp_path / "j").read_bytes() == b'7f70d62f {"i":0}\n'


def test_cut_at_any_byte_the_whole_lines_before_it_are_kept_and_the_rest_is_cut_off(tmp_path):
    with Journal(tmp_path / "whole") as journal:
        journal.append(ENTRIES)
    data = (tmp_path / "whole").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data)):
        (tmp_path / "j").write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        with Journal(tmp_path / "j") as journal:
            assert journal.entries == ENTRIES[:whole]
            assert journal.repaired_bytes == cut - ([0] + ends)[whole]
            journal.append([{"after": cut}])
        assert read(tmp_path / "j") == ENTRIES[:whole] + [{"after": cut}]


def test_a_flipped_bit_before_the_last_line_is_an_error_with_its_line_number(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append(ENTRIES)
    data = bytearray((tmp_path / "j").read_bytes())
    data[data.index(b"\n") + 15] ^= 1
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(UserError, match="line 2 is damaged"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == data


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path):
    code = f"from alpaca.common import cli, journal; cli.run_cli(lambda: journal.Journal({str(tmp_path / 'j')!r}))"
    with Journal(tmp_path / "j"):
        assert_one_line_error(run_script("-c", code), "in use by another process", "another output path")
    assert run_script("-c", code).returncode == 0


WRITER = """
import sys
from alpaca.common.journal import Journal
with Journal(sys.argv[1]) as journal:
    while True:
        n = len(journal.entries)
        journal.append([{"i": n, "text": "x" * 500}, {"i": n + 1}])
        print(n + 2, flush=True)
"""


@pytest.mark.parametrize("round", range(5))
def test_what_append_returned_for_is_there_after_sigkill(tmp_path, round):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "j"], cwd=ROOT, stdout=subprocess.PIPE)
    acknowledged = 0
    for _ in range(random.randint(1, 60)):
        acknowledged = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    rest, _ = writer.communicate()
    acknowledged = int((rest.split() or [acknowledged])[-1])
    entries = read(tmp_path / "j")
    assert len(entries) >= acknowledged
    assert [entry["i"] for entry in entries] == list(range(len(entries)))


def test_after_a_write_that_failed_in_the_middle_of_a_line_nothing_is_written_behind_it(tmp_path):
    log = Journal(tmp_path / "log")
    log.append([{"i": 0}])
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as a disk that is full from there on
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append([{"i": 1, "text": "x" * 20_000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    with pytest.raises(OSError, match="File too large"):  # though there is room now
        log.append([{"i": 2}])
    assert log.entries == [{"i": 0}]
    log.close()
    entries = read(tmp_path / "log")
    assert entries[0] == {"i": 0} and {"i": 2} not in entries


@pytest.mark.parametrize("path", ["", ".", "/", "..", "no/folder/out.jsonl"])
def test_an_output_that_can_be_no_file_is_refused(path):
    assert_user_error(lambda: check_output(path), "must be a file in an existing folder")
