import com.sun.management.OperatingSystemMXBean;
import java.lang.management.ManagementFactory;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.flink.api.common.functions.MapFunction;
import org.apache.flink.api.common.typeinfo.TypeInformation;
import org.apache.flink.api.common.typeinfo.Types;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.streaming.api.functions.sink.v2.DiscardingSink;
import org.apache.flink.table.api.DataTypes;
import org.apache.flink.table.api.Table;
import org.apache.flink.table.api.bridge.java.StreamTableEnvironment;
import org.apache.flink.table.types.DataType;
import org.apache.flink.types.Row;

/**
 * Scores rows of 128 FP32 by SQL on a model that returns X as Y, in an embedded Flink, and prints one line of JSON: the
 * rate and CPU time of the last nine tenths of the rows, by the clock of the sink, and how long their requests took.
 *
 * <pre>ScoreRows key=value...</pre>
 *
 * Keys: endpoint, model, rows, warm_up_model, warm_up_rows (a job before the one that counts), parallelism,
 * in_flight (max-concurrent-operations), client (see MendedTriton).
 */
public class ScoreRows {
  private static final int WIDTH = 128;

  public static void main(String[] arguments) throws Exception {
    Map<String, String> given = new HashMap<>();
    for (String argument : arguments) {
      String[] pair = argument.split("=", 2);
      given.put(pair[0], pair[1]);
    }
    score(given, given.get("warm_up_model"), Long.parseLong(given.get("warm_up_rows")));
    System.out.println("RESULT " + score(given, given.get("model"), Long.parseLong(given.get("rows"))));
    // Threads of OkHttp would keep the process alive for a minute.
    System.exit(0);
  }

  private static String score(Map<String, String> given, String model, long rows) throws Exception {
    CheckAndClock.begin(rows);
    StreamExecutionEnvironment environment =
        StreamExecutionEnvironment.getExecutionEnvironment(new Configuration());
    environment.setParallelism(Integer.parseInt(given.get("parallelism")));
    environment.getConfig().enableObjectReuse();
    StreamTableEnvironment tables = StreamTableEnvironment.create(environment);
    TypeInformation<Row> type =
        Types.ROW_NAMED(new String[] {"N", "X"}, Types.LONG, Types.PRIMITIVE_ARRAY(Types.FLOAT));
    tables.createTemporaryView(
        "SENT", tables.fromDataStream(environment.fromSequence(0, rows - 1).map(new Make(rows)).returns(type)));
    tables.executeSql(
        "CREATE TEMPORARY MODEL SCORER INPUT (X ARRAY<FLOAT NOT NULL>) OUTPUT (Y ARRAY<FLOAT NOT NULL>) WITH ("
            + "'provider' = 'triton-mended', 'model-version' = '1', 'endpoint' = '" + given.get("endpoint")
            + "', 'model-name' = '" + model + "', 'client' = '" + given.get("client") + "')");
    Table scored =
        tables.sqlQuery(
            "SELECT N, X, Y FROM ML_PREDICT(TABLE SENT, MODEL SCORER, DESCRIPTOR(X), MAP["
                + "'async', 'true', 'max-concurrent-operations', '" + given.get("in_flight") + "'])");
    // Without bridgedTo, Flink boxes every number of the rows that it hands over.
    DataType numbers = DataTypes.ARRAY(DataTypes.FLOAT().notNull()).bridgedTo(float[].class);
    DataType shape =
        DataTypes.ROW(
            DataTypes.FIELD("N", DataTypes.BIGINT()), DataTypes.FIELD("X", numbers), DataTypes.FIELD("Y", numbers));
    tables.<Row>toDataStream(scored, shape).map(new CheckAndClock()).sinkTo(new DiscardingSink<>());
    environment.execute();
    return CheckAndClock.end();
  }

  private static float[] numbers() {
    float[] numbers = new float[WIDTH];
    Random random = new Random(20240229);
    for (int place = 0; place < WIDTH; place++) {
      numbers[place] = random.nextFloat();
    }
    return numbers;
  }

  /** From a row's number to a row that begins with it. */
  private static class Make implements MapFunction<Long, Row> {
    private final float[] numbers = numbers();

    Make(long rows) {
      if (rows > 1 << 24) {
        throw new IllegalArgumentException("FP32 cannot number so many rows");
      }
    }

    @Override
    public Row map(Long number) {
      float[] x = numbers.clone();
      x[0] = number;
      return Row.of(number, x);
    }
  }

  /** Compares and counts rows. Its figures are those of the process, which runs one job at a time. */
  private static class CheckAndClock implements MapFunction<Row, Integer> {
    private static final AtomicLong SEEN = new AtomicLong();
    private static final AtomicLong SUM = new AtomicLong();
    private static final OperatingSystemMXBean SYSTEM =
        (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
    private static long rows;
    private static volatile long[] first;
    private static volatile long[] last;

    static void begin(long expected) {
      rows = expected;
      SEEN.set(0);
      SUM.set(0);
    }

    private static long[] now() {
      return new long[] {System.nanoTime(), SYSTEM.getProcessCpuTime()};
    }

    @Override
    public Integer map(Row row) {
      float[] x = row.getFieldAs("X");
      float[] y = row.getFieldAs("Y");
      if (!Arrays.equals(x, y)) {
        throw new IllegalStateException("an answer differs from what was sent: " + row);
      }
      SUM.addAndGet(row.<Long>getFieldAs("N"));
      long seen = SEEN.incrementAndGet();
      if (seen == rows / 10) {
        MendedTriton.LATENCIES.clear();
        first = now();
      }
      if (seen == rows) {
        last = now();
      }
      return 0;
    }

    static String end() {
      if (SEEN.get() != rows || SUM.get() != rows * (rows - 1) / 2) {
        throw new IllegalStateException(SEEN + " rows came instead of " + rows + ", or some twice");
      }
      long[] latencies = MendedTriton.LATENCIES.stream().mapToLong(Long::longValue).sorted().toArray();
      return String.format(
          "{\"rows\": %d, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"p50_seconds\": %.6f, \"p99_seconds\": %.6f}",
          rows - rows / 10,
          (last[0] - first[0]) / 1e9,
          (last[1] - first[1]) / 1e9,
          latencies[latencies.length / 2] / 1e9,
          latencies[latencies.length * 99 / 100] / 1e9);
    }
  }
}
