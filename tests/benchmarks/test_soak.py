"""The soak tells a run that grows from one that does not."""

from benchmarks.soak import find_growth, find_violations


def samples(memory, handles=20, threads=13):
    return [
        {"memory_mib": memory(second), "handles": handles + (second > 90), "threads": threads}
        for second in range(100)
    ]


def test_warming_up_is_no_growth():
    growth = find_growth(samples(lambda second: min(600 + 10 * second, 700)))
    assert growth["memory_mib"] == {"early": 700, "late": 700, "growth": 0}
    assert find_violations(growth, "rank 0") == []


def test_a_slow_leak_is_found():
    growth = find_growth(samples(lambda second: 600 + 0.5 * second))
    assert find_violations(growth, "rank 1") == [
        "memory_mib of rank 1 grew by 30.0, but 16 are allowed"
    ]
    leaks = [sample | {"threads": 13 + i // 10} for i, sample in enumerate(samples(lambda _: 1))]
    assert find_violations(find_growth(leaks), "rank 0") == [
        "threads of rank 0 grew by 6.0, but 1 are allowed"
    ]
