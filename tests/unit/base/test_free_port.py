"""A port that is found free and opened later: the kernel must not give it to another program meanwhile."""

from __future__ import annotations

import socket

import pytest

from encoder.base.dist import free_port


@pytest.mark.parametrize("first", [10050, 32768])
def test_a_free_port_is_none_that_the_kernel_hands_out(tmp_path, first):
    ranges = tmp_path / "ip_local_port_range"
    ranges.write_text(f"{first}\t60999\n")
    assert all(10000 <= free_port(ranges=str(ranges)) < first for _ in range(200))


def test_a_port_is_found_where_the_kernel_hands_out_all(tmp_path):
    ranges = tmp_path / "ip_local_port_range"
    ranges.write_text("1024\t65535\n")
    assert free_port(ranges=str(ranges)) >= 1024


def test_a_port_that_another_has_is_not_free(tmp_path):
    ranges = tmp_path / "ip_local_port_range"
    # ports 10000 and 10001
    ranges.write_text("10002\t60999\n")
    one = free_port(ranges=str(ranges))
    with socket.create_server(("127.0.0.1", one)):
        others = {free_port(ranges=str(ranges)) for _ in range(20)}
    assert one not in others
