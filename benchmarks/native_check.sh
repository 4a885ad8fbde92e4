#!/usr/bin/env bash
# native_check.cpp for compilers, instruction sets and sanitizers, then the engine's Python tests under ASan: a table.
#
#     benchmarks/native_check.sh [cases]        # with apt-get install clang g++-aarch64-linux-gnu qemu-user, four more
#
# Status 1 if one fails, or has other tokens than the first. What is not installed is left out.
cd "$(dirname "$0")/.." || exit 1
PATH=$PWD/.venv/bin:$PATH                   # the README's environment, where there is one
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export TSAN_OPTIONS=halt_on_error=1
row="%-31s %5s  %8s  %-8s  %-8s  %7s  %s\n"
first= failed=0 machine=$(uname -m)

# name, what runs the program ("" the machine itself), compiler and its flags
check() {
    local name=$1 runner=$2 cases=${cases:-80} begin=$SECONDS summary accepted= greedy= all= verdict=FAILED
    shift 2
    for tool in "$1" $runner; do
        command -v "$tool" > "$folder/path" || { printf "$row" "$name" "" "" "" "" "" "left out: no $tool"; return; }
    done
    if "$@" -std=c++20 -pthread benchmarks/native_check.cpp -o "$folder/check" 2> "$folder/log"; then
        begin=$SECONDS
        $runner "$folder/check" "$cases" > "$folder/log" 2>&1 && verdict=OK
        summary=$(grep " cases of W " "$folder/log")
        accepted=$(sed 's/.*accepted \(.*%\).*/\1/' <<< "$summary") all=${summary##* }
        greedy=$(sed 's/.*tokens \(.*\), .*/\1/' <<< "$summary")
        first=${first:-$greedy $all}
        [ "$verdict" = OK ] && [ "$first" != "$greedy $all" ] && verdict="OTHER TOKENS than the first"
    fi
    printf "$row" "$name" "$cases" "$accepted" "$greedy" "$all" "$((SECONDS - begin))" "$verdict"
    [ "$verdict" = OK ] || { failed=1; grep -v 'OK$' "$folder/log" | head -n 12 | sed 's/^/    /'; }
}

cases=$1
printf "$row" build cases accepted greedy all seconds ""
check "g++ native" "" g++ -O3 -march=native
if [ "$machine" = x86_64 ]; then
    check "g++ AVX2" "" g++ -O3 -march=haswell
    check "g++ SSE2" "" g++ -O3 -march=x86-64
fi
check "g++ native, address, undefined" "" \
    g++ -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all
check "g++ native, thread" "" g++ -O1 -g -march=native -fsanitize=thread
check "clang++ native" "" clang++ -O3 -march=native
if [ "$machine" = x86_64 ]; then
    check "clang++ AVX2" "" clang++ -O3 -march=haswell
    check "clang++ SSE2" "" clang++ -O3 -march=x86-64
    check "aarch64 g++, emulated" qemu-aarch64 aarch64-linux-gnu-g++ -O3 -static
fi

tests=tests/fast/test_native.py begin=$SECONDS verdict=FAILED
if [ -f $tests ]; then
    flags="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    env TINYMEDUSA_EXAMPLES=10 CXXFLAGS="$flags" XDG_CACHE_HOME="$folder" ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        python -m pytest -q -s -p no:cacheprovider $tests > "$folder/log" 2>&1 && verdict=OK
    printf "$row" "Python, address, undefined" "" "" "" "" "$((SECONDS - begin))" "$verdict: $(tail -n 1 "$folder/log")"
    [ "$verdict" = OK ] || { failed=1; tail -n 40 "$folder/log"; }
fi
exit $failed
