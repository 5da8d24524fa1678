"""The model family of nitp_titan: shapes (flavors), blocks (model) and their registry."""
