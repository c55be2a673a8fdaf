"""Engine of recordings: takes a recording, and yields its transcript. It does not depend on a protocol."""
