"""The version, alone, so that tools can read it without torch."""

VERSION = "1.0.0"
