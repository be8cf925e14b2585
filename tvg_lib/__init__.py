"""TVG Companion: four papers on finding moments in video by language, one small library."""

__version__ = "0.1.0"
