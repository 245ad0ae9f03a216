import java.util.ArrayList;
import java.util.List;
import org.apache.beam.sdk.Pipeline;
import org.apache.beam.sdk.extensions.python.PythonExternalTransform;
import org.apache.beam.sdk.io.TextIO;
import org.apache.beam.sdk.options.Default;
import org.apache.beam.sdk.options.PipelineOptions;
import org.apache.beam.sdk.options.PipelineOptionsFactory;
import org.apache.beam.sdk.options.Validation;
import org.apache.beam.sdk.schemas.Schema;
import org.apache.beam.sdk.schemas.Schema.FieldType;
import org.apache.beam.sdk.schemas.transforms.Select;
import org.apache.beam.sdk.transforms.JsonToRow;
import org.apache.beam.sdk.transforms.ToJson;
import org.apache.beam.sdk.values.PCollection;
import org.apache.beam.sdk.values.PCollectionTuple;
import org.apache.beam.sdk.values.Row;

/** Scores digits of a JSON Lines file on a Triton, from Java. docs/cross-language.md says how to run it. */
public class ScoreRows {
  /** The pipeline's own options. */
  public interface Options extends PipelineOptions {
    @Default.String("http://localhost:8000")
    String getTriton();

    void setTriton(String url);

    @Default.String("localhost:8097")
    String getExpansion();

    void setExpansion(String address);

    @Validation.Required
    String getFiles();

    void setFiles(String pattern);

    @Validation.Required
    String getOutput();

    void setOutput(String prefix);
  }

  /** The options of batching, error_handling and the like are rows. */
  private static Row row(String name, FieldType type, Object value) {
    return Row.withSchema(Schema.builder().addField(name, type).build()).addValue(value).build();
  }

  static PCollectionTuple score(PCollection<Row> rows, Options options) {
    return rows.apply(
        PythonExternalTransform.<PCollection<Row>, PCollectionTuple>from(
                "beam_triton.rows.TritonInference", options.getExpansion())
            .withTypeHint(ArrayList.class, FieldType.array(FieldType.STRING))
            .withKwarg("endpoint", options.getTriton())
            .withKwarg("model_name", "digits")
            .withKwarg("outputs", new ArrayList<>(List.of("label")))
            .withKwarg("batching", row("max_batch_size", FieldType.INT64, 64L))
            .withKwarg("error_handling", row("output", FieldType.STRING, "failed")));
  }

  public static void main(String[] arguments) {
    Options options = PipelineOptionsFactory.fromArgs(arguments).withValidation().as(Options.class);
    Pipeline pipeline = Pipeline.create(options);
    Schema digit =
        Schema.builder().addStringField("id").addArrayField("image", FieldType.FLOAT).build();
    PCollection<Row> rows =
        pipeline.apply(TextIO.read().from(options.getFiles())).apply(JsonToRow.withSchema(digit));

    PCollectionTuple scored = score(rows, options);
    PCollection<Row> results = scored.get("good");
    PCollection<Row> failures = scored.get("failed");
    write(results, options.getOutput() + "-scored");
    write(failures.apply(Select.fieldNames("element.id", "msg")), options.getOutput() + "-failed");
    pipeline.run().waitUntilFinish();
  }

  private static void write(PCollection<Row> rows, String path) {
    rows.apply(path + " as JSON", ToJson.of())
        .apply("write " + path, TextIO.write().to(path).withSuffix(".jsonl").withoutSharding());
  }
}
