"""Settings shared by all tests."""

from hypothesis import settings

# The default: the same examples on every run, so that a red run is red again.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
# A deeper search with fresh examples, by hand or nightly: pytest --hypothesis-profile=long
settings.register_profile("long", max_examples=5_000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("ci")
