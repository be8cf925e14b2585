"""From words and pictures to features."""
