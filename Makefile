# Everything that a developer or CI runs. `make` alone prints this list.

GO ?= go
# The packages whose tests talk to PostgreSQL: only those say something new on another version of it.
DATABASE_PACKAGES = $(addprefix ./,$(sort $(dir $(shell grep -rl --include='*_test.go' 'waystage/internal/pgtest"' . | sed 's|^\./||'))))
# Go remembers results without knowing of the PostgreSQL that they came from.
TEST_FLAGS ?= -count=1
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZ_TIME ?= 20s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

.DEFAULT_GOAL := help
.PHONY: help build demo test check test-15 test-16 test-17 test-18 race bench sabotage sabotage-long chaos fuzz lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/waystage, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X github.com/waystage/waystage/cmd.version=$(VERSION)' -o bin/waystage ./cmd/waystage

demo: ## see everything work, with invented data; ARGS=--keep leaves it running
	@scripts/postgresql.sh any >/dev/null
	$(GO) run ./cmd/waystage demo $(ARGS)

test: check test-15 test-18 ## all tests: on PostgreSQL 15, then those that use a database on 18

check: ## formatting and go vet
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted (run gofmt -w): $$unformatted" >&2; exit 1; fi
	$(GO) vet ./...

test-15: ## all tests on PostgreSQL 15
	@scripts/postgresql.sh 15 >/dev/null
	WAYSTAGE_TEST_PG=15 $(GO) test -timeout 15m $(TEST_FLAGS) ./...

test-16 test-17 test-18: test-%: ## tests that use a database, on PostgreSQL 16, 17, 18
	@scripts/postgresql.sh $* >/dev/null
	WAYSTAGE_TEST_PG=$* $(GO) test -timeout 15m $(TEST_FLAGS) $(DATABASE_PACKAGES)

race: ## all tests under the race detector
	@scripts/postgresql.sh 15 >/dev/null
	WAYSTAGE_TEST_PG=15 $(GO) test -race -timeout 40m $(TEST_FLAGS) ./...

bench: build ## measure beside PostgreSQL's own means, on 15 and 18, into bench.json and docs/performance/; ARGS="--only apply"
	@scripts/postgresql.sh 15 >/dev/null
	@scripts/postgresql.sh 18 >/dev/null
	bin/waystage bench --postgresql 15,18 $(ARGS)
	$(GO) run ./cmd/benchplots bench.json docs/performance

# A binary run by itself shows its lines as they come.
chaos: ## random histories: SEEDS=10 SEED=first SHRINK=1 STOP=1 KEEP=folder TAGS=sabotage
	@scripts/postgresql.sh 15 >/dev/null
	$(GO) test -c -tags '$(TAGS)' -o bin/chaos.test ./test/chaos
	cd test/chaos && WAYSTAGE_CHAOS_SEEDS=$(or $(SEEDS),10) WAYSTAGE_CHAOS_SEED=$(SEED) WAYSTAGE_CHAOS_SHRINK=$(SHRINK) WAYSTAGE_CHAOS_KEEP=$(KEEP) WAYSTAGE_CHAOS_STOP=$(STOP) \
		../../bin/chaos.test -test.run '^TestHistories$$' -test.timeout 0

sabotage: ## each deliberate bug must fail the test that is there to catch it
	@scripts/postgresql.sh 15 >/dev/null
	WAYSTAGE_TEST_PG=15 $(GO) test -tags sabotage -timeout 30m -count=1 -parallel 5 ./internal/sabotage

sabotage-long: ## each deliberate bug must be noticed by the random histories, too
	@scripts/postgresql.sh 15 >/dev/null
	$(GO) test -c -tags sabotage -o bin/sabotage.test ./test/chaos
	cd test/chaos && ../../bin/sabotage.test -test.run '^TestEveryBugIsFound$$' -test.timeout 0

fuzz: ## each fuzz target for FUZZ_TIME (20s)
	@set -e; for file in $$(grep -rlE --include='*_test.go' '^func Fuzz' .); do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' $$file); do \
			echo "$$(dirname $$file) $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZ_TIME) $$(dirname $$file); \
		done; \
	done

lint: ## staticcheck
	$(GO) run $(STATICCHECK) ./...

clean: ## remove what the build made
	rm -rf bin bench.json
