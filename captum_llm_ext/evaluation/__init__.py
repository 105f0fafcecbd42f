"""Whether attributions can be relied on: `faithfulness` to the model, `sensitivity` to absence."""
