"""ShapeStories: little films of coloured shapes with planted moments, from pixels to answers."""
