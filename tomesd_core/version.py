"""The version, alone, so that tools can read it without torch."""

VERSION = "0.1.0"
