"""Does trajectory splitting teach what late turns need? Five ways to cut long transcripts, trained and compared."""
